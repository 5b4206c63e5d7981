"""Rotary position embedding, in the half-split form of GPT-NeoX: dimension i turns together with i + head_dim / 2.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeAngles:
    """Cosines and sines of one step's positions, [T, head_dim / 2] each, made once and used by every layer."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] -> the same shape, each head turned by its token's position."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RotaryEmbedding:
    """Makes the angles. They are computed in fp32 and rounded once to the model's dtype, as transformers does.

    positions: for so many, they are kept in a table, and looked up.
    """

    def __init__(
        self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device, positions: int = 0
    ) -> None:
        self.dtype = dtype
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.inverse_frequencies = 1.0 / theta**exponents  # [head_dim / 2]
        self._table: Tensor | None = None  # [positions, 2, head_dim / 2]
        if positions:
            known = self(torch.arange(positions, device=device))
            self._table = torch.stack((known.cos, known.sin), dim=1)

    def __call__(self, positions: Tensor) -> RopeAngles:
        """positions: [T] integers."""
        if self._table is not None:
            cos, sin = self._table.index_select(0, positions).unbind(1)
            return RopeAngles(cos, sin)
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequencies
        return RopeAngles(cos=angles.cos().to(self.dtype), sin=angles.sin().to(self.dtype))
