"""The model's element-wise operations through the GPU kernels."""

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm, silu_multiply


def has_dependent_launch(device: torch.device) -> bool:
    """Whether the card starts a kernel while the one before it still runs (programmatic dependent launch; Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class GpuOperations:
    """A `LayerOperations` (qwen3/layers/operations.py)."""

    def __init__(self, device: torch.device) -> None:
        self.pdl = has_dependent_launch(device)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        add_rms_norm(x, residual, weight, eps, x, pdl=self.pdl)
        return x

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        output = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        silu_multiply(gate_up, output, pdl=self.pdl)
        return output
