"""Rotary position embedding, in the half-split form of GPT-NeoX: dimension i turns together with i + head_dim / 2.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeAngles:
    """Cosines and signed sines of one step's positions, [T, 1, head_dim] each, made once and used by every layer.

    `sin` has its first half negated, so that rotating is x * cos + roll(x, head_dim / 2) * sin.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] -> the same shape, each head turned by its token's position."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class RotaryEmbedding:
    """Makes the angles. They are computed in fp32 and rounded once to the model's dtype, as transformers does."""

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.inverse_frequencies = 1.0 / theta**exponents  # [head_dim / 2]

    def __call__(self, positions: Tensor) -> RopeAngles:
        """positions: [T] integers."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return RopeAngles(
            cos=torch.cat((cos, cos), -1).to(self.dtype).unsqueeze(1),
            sin=torch.cat((-sin, sin), -1).to(self.dtype).unsqueeze(1),
        )
