"""The element-wise operations between a layer's matrix products: what the model asks for, and a plain torch answer.

`model_worker` hands the model an implementation with fused kernels where the device has them; TorchOperations is the
reference that those are tested against. T tokens (rows), N and I any size. x in the model's dtype, values in fp32
inside.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LayerOperations(Protocol):
    """One device's way of doing them. An implementation may overwrite its inputs only where that is said."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x, in place; returns residual / rms(residual) * weight over the last dimension.

        x, residual: [T, N]; weight: [N]. x is spent: it may be overwritten, also by the result. Returns [T, N].
        """
        ...

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up: [T, 2 x I], gate first. Returns [T, I]."""
        ...


class TorchOperations:
    """Plain torch, for any device and dtype."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, weight.shape, weight, eps)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
