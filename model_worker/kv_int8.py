"""The KV cache in 8 bits: each key and each value of a token and KV head is int8 codes and one fp32 scale.

Symmetric: code = round(x / scale), to even, scale = max |x| / 127, so that an element is off by at most scale / 2. A
page holds the codes of all its tokens, [token, kv head, head dim], and behind them the scales, [kv head, token]: a page
stays one piece of memory, rows of codes keep their alignment, and the scales that a KV head's tokens need lie together.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
LEVELS = 127
HEAD_DIM_MULTIPLE = 8  # keeps the scales aligned, and is what the kernels work in


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., head dim], any floating dtype. Returns int8 codes, [..., head dim], and fp32 scales, [...].

    A NaN or an infinity in x makes the scale one too, so that what is read back is not finite.
    """
    x = x.float()
    scales = x.abs().amax(-1) / LEVELS
    divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)  # 0: all of x is 0
    codes = (x / divisor).nan_to_num_(0.0).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: [..., head dim] int8, scales: [...] fp32. Returns their product in fp32, rounded to dtype."""
    return (codes * scales.unsqueeze(-1)).to(dtype)
