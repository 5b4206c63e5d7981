"""One layer's keys and values in the paged pool, as the kernels see them; and how they are kept in fp8.

In fp8 (e4m3) each key and each value of a token and KV head is codes and one fp32 scale, max |x| / 448. Kernels read
two codes as one word of 16 bits. Its halves, shifted into an fp16's place, are the values over 256, as the exponents'
biases are 7 and 15: cheaper than a conversion, and products run in fp16, once for even dims and once for odd ones.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)
LARGEST_BITS = tl.constexpr(0x43E00000)  # of 448 in fp32
LEAST_NORMAL_BITS = tl.constexpr(0x3C800000)  # of 2**-6
UNIT = tl.constexpr(256.0)  # a code's value over its half's


@dataclass(frozen=True)
class LayerCache:
    """keys, values: [page, token, kv head, D], any strides but the last; in fp8 int16, [..., D / 2].

    key_scales, value_scales: [page, kv head, token] fp32, of fp8.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def of_codes(cls, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor) -> "LayerCache":
        """keys, values: int8, [page, token, kv head, D]."""
        return cls(keys.view(torch.int16), values.view(torch.int16), key_scales, value_scales)

    @property
    def fp8(self) -> bool:
        return self.key_scales is not None

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3] * (2 if self.fp8 else 1)

    @property
    def scale_arguments(self) -> tuple[Tensor, Tensor, int]:
        """Key and value scales and their stride of pages, for a kernel; without scales something that is not read."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys, self.values, 0
        assert self.key_scales.stride() == self.value_scales.stride()
        assert self.key_scales.stride()[1:] == (self.key_scales.shape[2], 1)
        return self.key_scales, self.value_scales, self.key_scales.stride(0)


@triton.jit
def encode(x):
    """x: [H, D] fp32. Returns codes, [H, D] int8, and scales, [H], which are NaN where anything in x is not finite."""
    scale = tl.max(tl.abs(x), 1) / LARGEST + tl.sum(x * 0.0, 1)
    scaled = x / tl.where(scale > 0.0, scale, 1.0)[:, None]
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, LARGEST_BITS)
    # To three bits of the mantissa, halves to even; then from the bias of fp32 to that of e4m3.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 codes count in steps of 2**-9, which are the last bit of an fp32 of 2**14.
    shifted = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(magnitude < LEAST_NORMAL_BITS, shifted & 0xF, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.int8), scale


@triton.jit
def even_dims(words, ASM: tl.constexpr):
    """int16 words -> fp16: the value of each low byte, over UNIT. ASM: two words an instruction."""
    if ASM:
        halves = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; and.b32 a, $1, 0x00800080; shl.b32 a, a, 8; and.b32 b, $1, 0x007f007f; "
            "shl.b32 b, b, 7; or.b32 $0, a, b; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        halves = (((words & 0x80) << 8) | ((words & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return halves


@triton.jit
def odd_dims(words, ASM: tl.constexpr):
    """The same of each high byte."""
    if ASM:
        halves = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; and.b32 a, $1, 0x80008000; and.b32 b, $1, 0x7f007f00; shr.u32 b, b, 1; "
            "or.b32 $0, a, b; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        halves = ((words & -32768) | ((words & 0x7F00) >> 1)).to(tl.int16).to(tl.float16, bitcast=True)
    return halves
