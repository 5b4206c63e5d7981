"""RMSNorm's weight and epsilon; how it is computed is `qwen3/layers/operations.py`'s matter."""

import torch

from vibe_sgl_lite.qwen3.layers.weight import Weight


class RMSNorm:
    """x / rms(x) * weight over the last dimension, of `size`; replicated on all ranks."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Weight((size,), dtype, device)
