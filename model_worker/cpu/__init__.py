"""Fused CPU kernels, written in C++ without any torch header and compiled at first use: `load()` gives them, or None.

native/ holds the C++, build.py compiles and caches it, api.py calls it on tensors.
"""

from vibe_sgl_lite.model_worker.cpu.api import CpuKernels, LayerCache, load

__all__ = ["CpuKernels", "LayerCache", "load"]
