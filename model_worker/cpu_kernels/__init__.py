"""Fused CPU kernels, written in C++ without any torch header and compiled at first use: `load()` gives them, or None.

native/ holds the C++, build.py compiles and caches it, api.py calls it on tensors.
"""

from model_worker.cpu_kernels.api import CpuKernels, LayerCache, load

__all__ = ["CpuKernels", "LayerCache", "load"]
