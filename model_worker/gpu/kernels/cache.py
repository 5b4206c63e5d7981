"""One layer's keys and values in the paged pool, as the kernels see them; and how they are kept in 8 bits.

There each key and each value of a token and KV head is codes and one fp32 scale: integers, as on a CPU
(model_worker/kv_int8.py), or fp8 (e4m3) with scale max |x| / 448. Kernels read two codes as one word of 16 bits and
make an fp16 of each half, so that products run in fp16, once for even dims and once for odd ones. An integer plus 128
becomes the last bits of 1024; e4m3, shifted into an fp16's place, is the value over 256, as the exponents' biases are 7
and 15. Both are far cheaper than a conversion.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST, LARGEST_INTEGER = tl.constexpr(448.0), tl.constexpr(127.0)
LARGEST_BITS = tl.constexpr(0x43E00000)  # of 448 in fp32
LEAST_NORMAL_BITS = tl.constexpr(0x3C800000)  # of 2**-6
ROUNDER, ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # 1.5 x 2**23: its last bit is 1


@dataclass(frozen=True)
class LayerCache:
    """keys, values: [page, token, kv head, D], any strides but the last; in 8 bits int16, [..., D / 2].

    key_scales, value_scales: [page, kv head, token] fp32, of 8 bits. integers: the codes are, and not fp8.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    integers: bool = False

    @classmethod
    def of_codes(
        cls, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor, *, integers: bool
    ) -> "LayerCache":
        """keys, values: int8, [page, token, kv head, D]."""
        return cls(keys.view(torch.int16), values.view(torch.int16), key_scales, value_scales, integers)

    @property
    def in_codes(self) -> bool:
        return self.key_scales is not None

    @property
    def unit(self) -> float:
        """A code's value over that of the fp16 that is made of it."""
        return 1.0 if self.integers else 256.0

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3] * (2 if self.in_codes else 1)

    @property
    def scale_arguments(self) -> tuple[Tensor, Tensor, int]:
        """Key and value scales and their stride of pages, for a kernel; without scales something that is not read."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys, self.values, 0
        assert self.key_scales.stride() == self.value_scales.stride()
        assert self.key_scales.stride()[1:] == (self.key_scales.shape[2], 1)
        return self.key_scales, self.value_scales, self.key_scales.stride(0)


@triton.jit
def encode(x, INTEGERS: tl.constexpr):
    """x: [H, D] fp32. Returns codes, [H, D] int8, and scales, [H], which are NaN where anything in x is not finite."""
    largest: tl.constexpr = LARGEST_INTEGER if INTEGERS else LARGEST
    scale = tl.div_rn(tl.max(tl.abs(x), 1), largest) + tl.sum(x * 0.0, 1)
    # Divided as on a CPU, to the last bit: the code of what lies between two of them depends on it.
    scaled = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)[:, None])
    if INTEGERS:
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST_INTEGER), LARGEST_INTEGER)
        code = (scaled + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, LARGEST_BITS)
        # To three bits of the mantissa, halves to even; then from the bias of fp32 to that of e4m3.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2**-6 codes count in steps of 2**-9, which are the last bit of an fp32 of 2**14.
        shifted = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        code = tl.where(magnitude < LEAST_NORMAL_BITS, shifted & 0xF, normal) | ((bits >> 24) & 0x80)
    return code.to(tl.int8), scale


@triton.jit
def decode(codes, scale, INTEGERS: tl.constexpr):
    """What codes, [H, D] int8, and scales, [H], say: fp32."""
    if INTEGERS:
        values = codes.to(tl.float32)
    else:
        wide = codes.to(tl.int16)
        values = ((wide & -32768) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return values * scale[:, None]


@triton.jit
def even_dims(words, INTEGERS: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> fp16: what each low byte is, over the format's unit. ASM: two words an instruction."""
    if ASM:
        if INTEGERS:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b32 a, c; and.b32 a, $1, 0x00ff00ff; xor.b32 a, a, 0x00800080; or.b32 a, a, 0x64006400; "
                "mov.b32 c, 0x64806480; sub.f16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; and.b32 a, $1, 0x00800080; shl.b32 a, a, 8; and.b32 b, $1, 0x007f007f; "
                "shl.b32 b, b, 7; or.b32 $0, a, b; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    elif INTEGERS:
        halves = (((words & 0xFF) ^ 0x80) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        halves = (((words & 0x80) << 8) | ((words & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return halves


@triton.jit
def odd_dims(words, INTEGERS: tl.constexpr, ASM: tl.constexpr):
    """The same of each high byte."""
    if ASM:
        if INTEGERS:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b32 a, c; shr.u32 a, $1, 8; and.b32 a, a, 0x00ff00ff; xor.b32 a, a, 0x00800080; "
                "or.b32 a, a, 0x64006400; mov.b32 c, 0x64806480; sub.f16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            halves = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; and.b32 a, $1, 0x80008000; and.b32 b, $1, 0x7f007f00; shr.u32 b, b, 1; "
                "or.b32 $0, a, b; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    elif INTEGERS:
        halves = ((((words >> 8) & 0xFF) ^ 0x80) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        halves = ((words & -32768) | ((words & 0x7F00) >> 1)).to(tl.int16).to(tl.float16, bitcast=True)
    return halves
