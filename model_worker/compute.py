"""Chooses how a rank computes: the one place that knows the alternatives, but for matrices (matrix_formats.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vibe_sgl_lite.model_worker.attention.cpu_backend import KernelAttention
from vibe_sgl_lite.model_worker.attention.torch_backend import TorchAttention
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.operations import KernelOperations
from vibe_sgl_lite.model_worker.device_batch import StepBackend, StepGraphs
from vibe_sgl_lite.model_worker.kv_pool import KVLayout, KVPool
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations, TorchOperations


@dataclass(frozen=True)
class Compute:
    """Element-wise operations, and attention once there is a pool. name: for logs. kernels: for all else, if any.

    kv_layout: what the attention wants of its pool. graphs: makes what captures the steps of one runner, if anything.
    """

    name: str
    operations: LayerOperations
    attention: Callable[[KVPool], StepBackend]
    kernels: CpuKernels | None = None
    kv_layout: KVLayout = KVLayout.PAGES
    graphs: Callable[[], StepGraphs] | None = None


def torch_compute() -> Compute:
    """Plain torch: works everywhere, and is what the others are tested against."""
    return Compute("plain torch", TorchOperations(), TorchAttention)


def kernel_compute(kernels: CpuKernels) -> Compute:
    """Everything through the compiled kernels; for fp32 and bf16 on a CPU."""
    name = f"CPU kernels ({kernels.instruction_set})"
    return Compute(name, KernelOperations(kernels), lambda pool: KernelAttention(kernels, pool), kernels)


def choose_compute(dtype: torch.dtype, device: torch.device, head_dim: int) -> Compute:
    """The fastest that this machine has for these: compiled kernels on a CPU with a compiler, else plain torch."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and head_dim % 8 == 0:
        kernels = load()
        if kernels is not None:
            return kernel_compute(kernels)
    return torch_compute()
