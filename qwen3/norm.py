"""RMSNorm over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3.weight import Weight


class RMSNorm:
    """x / rms(x) * weight, computed in fp32 and returned in x's dtype. For [..., size]; replicated on all ranks."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Weight((size,), dtype, device)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.tensor, self.eps)
