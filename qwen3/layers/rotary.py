"""Rotary position embedding, in the half-split form of GPT-NeoX: dimension i turns together with i + head_dim / 2.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vibe_sgl_lite.runtime.settings.model_config import Yarn


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
    yarn: stretches slow rotations to a longer context and leaves fast ones; section 3 of Peng et al., "YaRN: Efficient
    Context Window Extension of Large Language Models", 2023, with transformers' options.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        dtype: torch.dtype,
        device: torch.device,
        positions: int = 0,
        yarn: Yarn | None = None,
    ) -> None:
        self.dtype = dtype
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        periods = theta**exponents
        self.inverse_frequencies = 1.0 / periods  # [head_dim / 2]
        self.scale = 1.0
        if yarn is not None:
            kept = _kept(yarn, head_dim, theta).to(device)
            # In transformers' order of operations: a bit's difference is 0.01 rad after 131,072 tokens.
            self.inverse_frequencies = 1.0 / (yarn.factor * periods) * (1 - kept) + self.inverse_frequencies * kept
            self.scale = _attention_factor(yarn)
        self.table: Tensor | None = None  # [positions, 2, head_dim / 2]
        if positions:
            known = self(torch.arange(positions, device=device))
            self.table = torch.stack((known.cos, known.sin), dim=1)

    def __call__(self, positions: Tensor) -> RopeAngles:
        """positions: [T] integers."""
        if self.table is not None:
            cos, sin = self.table.index_select(0, positions).unbind(1)
            return RopeAngles(cos, sin)
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return RopeAngles(cos.to(self.dtype), sin.to(self.dtype))


def _kept(yarn: Yarn, head_dim: int, theta: float) -> Tensor:
    """[head_dim / 2]: 1 for frequencies that stay as they are, 0 for those that are divided by the factor."""

    def dimension(rotations: float) -> float:
        """Of the frequency that turns so many times over the trained length."""
        length = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast or 32.0), dimension(yarn.beta_slow or 1.0)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    return 1 - ramp.clamp(0, 1)


def _attention_factor(yarn: Yarn) -> float:
    def scale(weight: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * weight * math.log(yarn.factor) + 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1.0)
