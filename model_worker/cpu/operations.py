"""The model's element-wise operations through the CPU kernels."""

from torch import Tensor

from vibe_sgl_lite.model_worker.cpu import CpuKernels


class KernelOperations:
    """A `LayerOperations` (qwen3/layers/operations.py) for fp32 and bf16 on a CPU."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.kernels.add_rms_norm(x, residual, weight, eps)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        return self.kernels.silu_mul(gate_up)
