"""What a product with a matrix in fp8 takes beside the card's fp8 units: rows in fp8, and products of a few rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.cache import encode, even_dims, odd_dims

UNIT = tl.constexpr(256.0)  # a code's value over that of the fp16 which is made of it


@triton.jit
def _encode_rows(x, codes, scales, N: tl.constexpr, NP: tl.constexpr, PDL: tl.constexpr):
    """A program a row."""
    column = tl.arange(0, NP)[None, :]
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    code, scale = encode(value, False)
    tl.store(codes + row * N + column, code, mask=column < N)
    tl.store(scales + row + tl.arange(0, 1), scale)


def encode_rows(x: Tensor, codes: Tensor, scales: Tensor, *, pdl: bool) -> None:
    """codes [R, N] fp8 times scales [R] fp32 is x [R, N]; a row with NaN or infinity gets a scale of NaN."""
    rows, columns = x.shape
    assert x.is_contiguous()
    assert codes.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    _encode_rows[(rows,)](
        x, codes.view(torch.int8), scales, N=columns, NP=triton.next_power_of_2(columns), PDL=pdl, num_warps=4,
        **options,
    )  # fmt: skip


@triton.jit
def _encode_groups(x, codes, scales, stride, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (R, blocks of BLOCK groups)."""
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 128)
    column = group[:, None] * 128 + (place // 2 + place % 2 * 64)[None, :]
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    code, scale = encode(value, False)
    here = group < KP // 128
    tl.store(codes + row * KP + group[:, None] * 128 + place[None, :], code, mask=here[:, None])
    tl.store(scales + group * stride + row, scale, mask=here)


def encode_groups(x: Tensor, codes: Tensor, scales: Tensor, *, pdl: bool) -> None:
    """x [R, K], filled up with zeros, as codes [R, G x 128] fp8 times scales [G, R] fp32, one for each 128 inputs; both
    may have more rows. Of
    each 128 codes the even ones are the first 64, as in the words of grouped_product.py."""
    rows, columns = x.shape
    assert x.is_contiguous()
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    groups, stride = scales.shape
    options = {"launch_pdl": True} if pdl else {}
    _encode_groups[(rows, triton.cdiv(groups, 8))](
        x, codes.view(torch.int8), scales, stride, K=columns, KP=groups * 128, BLOCK=8, PDL=pdl, num_warps=4, **options
    )


@triton.jit
def _fp8_gemv(
    x, words, scales, output, N, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program BLOCK outputs of all ROWS. words: two codes each, K / 2 a row; KP: that, a power of two or more."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, KP)
    here = (out < N)[:, None] & (pair < K // 2)[None, :]
    if PDL:
        gdc_launch_dependents()
    weights = tl.load(
        words + out.to(tl.int64)[:, None] * (K // 2) + pair[None, :], mask=here, other=0, eviction_policy="evict_first"
    )
    scale = tl.load(scales + out, mask=out < N, other=0.0) * UNIT
    if PDL:
        gdc_wait()
    even = even_dims(weights, False, ASM).to(tl.float32)
    odd = odd_dims(weights, False, ASM).to(tl.float32)
    for row in tl.static_range(ROWS):
        line = x + row * K + pair * 2
        first = tl.load(line, mask=pair < K // 2, other=0.0).to(tl.float32)
        second = tl.load(line + 1, mask=pair < K // 2, other=0.0).to(tl.float32)
        total = tl.sum(even * first[None, :] + odd * second[None, :], 1) * scale
        tl.store(output + row * N + out, total.to(output.dtype.element_ty), mask=out < N)


def fp8_gemv(x: Tensor, codes: Tensor, scales: Tensor, output: Tensor, *, pdl: bool) -> None:
    """output [R, N] = x [R, K] times (codes [N, K] fp8 times scales [N] fp32), transposed. R: a few. K: even."""
    rows, inputs = x.shape
    outputs = len(codes)
    assert x.is_contiguous()
    assert codes.is_contiguous()
    assert output.is_contiguous()
    pairs = triton.next_power_of_2(inputs // 2)
    block = min(max(1, 16 * 1024 // pairs), 32)
    options = {"launch_pdl": True} if pdl else {}
    _fp8_gemv[(triton.cdiv(outputs, block),)](
        x, codes.view(torch.int16), scales, output, outputs, K=inputs, KP=pairs, BLOCK=block, ROWS=rows,
        ASM=x.is_cuda, PDL=pdl, num_warps=8, **options,
    )  # fmt: skip
