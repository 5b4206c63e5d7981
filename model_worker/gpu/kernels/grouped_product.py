"""Products with a matrix of codes that share a scale for each output and group of inputs: 4 bits with zeros, or e4m3.

Codes become numbers in registers, just before the card's matrix units take them, so that a step of few rows takes as
long as its codes take to be read. A word of 16 bits has the codes of 4 (or 2) inputs that lie P apart: those at one
place within the words of a tile are a tile of the matrix, and one instruction unpacks two neighbours. As in product.py,
norm, SiLU and the residual sum are folded in, and inputs are cut in splits.

The matrix units want 8 or 16 rows at least and take no longer for them, so that one kernel serves one row and hundreds.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch, prefetch

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}  # bits; of the types that have instructions for two numbers at once
PREFETCH_UNITS = tl.constexpr(8)


@dataclass(frozen=True)
class GroupedCodes:
    """An [outputs, inputs] matrix, filled up to whole tiles: [O, I].

    words: int16; word i of a unit of plane x 16 / bits inputs has in its lowest bits the code of the unit's input i,
    above it that of input i + plane, and so on. With 8 bits [O, I x bits / 16]; with 4 the same number in another
    order, that of [O / 8, units, 8, plane]: so 8 outputs have a unit behind each other. scales: [O / 8, I / group, 8];
    of e4m3, with 8 bits, fp32; with 4 bits int32, an fp16 and above it the zero. order: [inputs] int32, the place in x
    of each input, where it is another one.
    """

    words: Tensor
    scales: Tensor
    order: Tensor | None
    outputs: int
    inputs: int
    bits: int
    plane: int
    group: int

    @property
    def units(self) -> int:
        return self.words.shape[1] // self.plane

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.order)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class GroupedTiles:
    """How a product is cut. rows, outputs: of a tile, outputs being the matrix's; splits: of the inputs; warps and
    pipeline stages of a program."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int


@triton.jit
def _number4(words, zero, PLACE: tl.constexpr, MANTISSA_BITS: tl.constexpr, dtype: tl.constexpr):
    """The code at PLACE in each word, less its zero: exact. A code that stands in the last bits of a mantissa is worth
    2 ** MANTISSA_BITS more than it says, and so is its zero. [N, P] of [N, P] and [N, 1]."""
    if MANTISSA_BITS == 7:
        zero = tl.broadcast_to(zero | 0x4300, words.shape)
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; lop3.b32 a, $1, 0x000f000f, 0x43004300, 0xea; sub.bf16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 1:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 4; lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; sub.bf16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 2:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 8; lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; sub.bf16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 12; lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; "
                "sub.bf16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif MANTISSA_BITS == 10:
        zero = tl.broadcast_to(zero | 0x6400, words.shape)
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; lop3.b32 a, $1, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 1:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 4; lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 2:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 8; lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 12; lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, a, $2; }",
                "=r,r,r", [words, zero], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        number = (((words >> (4 * PLACE)) & 15).to(tl.float32) - zero.to(tl.float32)).to(dtype)
    return number


@triton.jit
def _number8(words, PLACE: tl.constexpr, MANTISSA_BITS: tl.constexpr, dtype: tl.constexpr):
    """The e4m3 at PLACE in each word: moved to where the type has its bits, which has the powers of two of another
    bias, and multiplied by what that differs. No NaN."""
    if MANTISSA_BITS == 7:
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, c; shl.b32 a, $1, 4; and.b32 a, a, 0x07f007f0; shl.b32 b, $1, 8; "
                "lop3.b32 a, b, 0x80008000, a, 0xea; mov.b32 c, 0x7b807b80; mul.bf16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a, c; shr.u32 a, $1, 4; and.b32 a, a, 0x07f007f0; "
                "lop3.b32 a, $1, 0x80008000, a, 0xea; mov.b32 c, 0x7b807b80; mul.bf16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif MANTISSA_BITS == 10:
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, c; shl.b32 a, $1, 7; and.b32 a, a, 0x3f803f80; shl.b32 b, $1, 8; "
                "lop3.b32 a, b, 0x80008000, a, 0xea; mov.b32 c, 0x5c005c00; mul.f16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a, c; shr.u32 a, $1, 1; and.b32 a, a, 0x3f803f80; "
                "lop3.b32 a, $1, 0x80008000, a, 0xea; mov.b32 c, 0x5c005c00; mul.f16x2 $0, a, c; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        code = words >> (8 * PLACE)
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        number = (half.to(tl.float32) * 256.0).to(dtype)
    return number


@triton.jit
def _numbers(words, zero, PLACE: tl.constexpr, BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, dtype: tl.constexpr):
    if BITS == 4:
        numbers = _number4(words, zero, PLACE, MANTISSA_BITS, dtype)
    else:
        numbers = _number8(words, PLACE, MANTISSA_BITS, dtype)
    return numbers


@triton.jit
def _scale_and_zero(places, BITS: tl.constexpr):
    """Of a group, [N, 1] each; the zero is of no use with 8 bits."""
    scale = tl.load(places)[:, None]
    zero = scale
    if BITS == 4:
        zero = (scale >> 16).to(tl.int16)
        scale = scale.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _grouped_product(
    x, words, scales, order, squares, addend, gain, output, gained, new_squares, sums, arrived, rows, eps,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, PARTS_P: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of N, SPLITS). KP: K, filled up. With SILU a tile has BLOCK_N / 2
    outputs, and the matrix's rows of both halves for them. PARTS: of each row's sum of squares in `squares`, 0: without
    them; PARTS_P: that, a power of two or more."""
    PLACES: tl.constexpr = 16 // BITS
    UNIT: tl.constexpr = P * PLACES
    UNITS: tl.constexpr = KP // UNIT
    GROUPS: tl.constexpr = UNIT // GROUP
    EACH: tl.constexpr = (UNITS + SPLITS - 1) // SPLITS
    WIDTH: tl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    WIDE: tl.constexpr = N * 2 if SILU else N
    dtype: tl.constexpr = x.dtype.element_ty
    HALVES: tl.constexpr = MANTISSA_BITS if ASM else 0
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * WIDTH + rank % WIDTH + rank // WIDTH * N  # of the matrix
    split = tl.program_id(2)
    real = line < rows
    first = split * EACH
    end = tl.minimum(first + EACH, UNITS)
    LINE: tl.constexpr = KP // PLACES
    ROW: tl.constexpr = P if BITS == 4 else LINE  # from one output's words to the next one's
    STEP: tl.constexpr = 8 * P if BITS == 4 else P  # from one unit's to the next one's
    begin = words + ((row // 8).to(tl.int64) * (8 * LINE) + row % 8 * ROW)[:, None]
    scale_begin = scales + (row // 8).to(tl.int64) * (8 * KP // GROUP) + row % 8
    place = tl.arange(0, P)
    if PDL:
        gdc_launch_dependents()
        if tl.program_id(0) == 0:  # while the kernel before this one still runs
            ahead = tl.minimum(first + tl.arange(0, PREFETCH_UNITS), end - 1)
            prefetch(begin + ahead[None, :] * STEP)
        gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in tl.range(first, end, num_stages=STAGES):
        codes = tl.load(begin + unit * STEP + place[None, :])
        for part in tl.static_range(GROUPS):
            scale, zero = _scale_and_zero(scale_begin + (unit * GROUPS + part) * 8, BITS)
            some = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for inner in tl.static_range(GROUP // P):
                column = unit * UNIT + (part * (GROUP // P) + inner) * P + place
                here = real[:, None]
                if KP != K:
                    here = here & (column < K)[None, :]
                if ORDERED:
                    column = tl.load(order + column, mask=column < K, other=0)
                a = tl.load(x + line[:, None] * K + column[None, :], mask=here, other=0.0)
                numbers = _numbers(codes, zero, part * (GROUP // P) + inner, BITS, HALVES, dtype)
                some = tl.dot(numbers, a.T, some, input_precision=PRECISION)
            total += some * scale
    is_last = True
    if SPLITS > 1:
        size = rows * WIDE
        wide_spot = line[None, :] * WIDE + row[:, None]
        there = real[None, :] & (row < WIDE)[:, None]
        tl.store(sums + split * size + wide_spot, total, mask=there)
        tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.load(sums + wide_spot, mask=there, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                total += tl.load(sums + part * size + wide_spot, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if is_last:
        if PARTS > 0:
            part = tl.arange(0, PARTS_P)
            parts = real[:, None] & (part < PARTS)[None, :]
            squared = tl.load(squares + line[:, None] * PARTS + part[None, :], mask=parts, other=0.0)
            total = total * tl.rsqrt(tl.sum(squared, 1) / K + eps)[None, :]
        if SILU:
            halves = tl.permute(tl.reshape(total, [2, WIDTH, BLOCK_M]), (1, 2, 0))
            gate, up = tl.split(halves)
            result = gate / (1.0 + tl.exp(-gate)) * up
        else:
            result = total
        out = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        spot = line[None, :] * N + out[:, None]
        inside = real[None, :] & (out < N)[:, None]
        if ADD:
            result += tl.load(addend + spot, mask=inside, other=0.0).to(tl.float32)
        result = result.to(output.dtype.element_ty)
        tl.store(output + spot, result, mask=inside)
        if ADD:
            wide = result.to(tl.float32)
            square = tl.sum(tl.where(inside, wide * wide, 0.0), 0)
            wide = wide * tl.load(gain + out, mask=out < N, other=0.0).to(tl.float32)[:, None]
            tl.store(gained + spot, wide.to(gained.dtype.element_ty), mask=inside)
            tl.store(new_squares + line * tl.num_programs(1) + tl.program_id(1), square, mask=real)


def grouped_product(
    x: Tensor,
    matrix: GroupedCodes,
    output: Tensor,
    tiles: GroupedTiles,
    scratch: ProductScratch,
    *,
    pdl: bool,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gain: Tensor | None = None,
    gained: Tensor | None = None,
    new_squares: Tensor | None = None,
    silu: bool = False,
) -> None:
    """output [R, N] = x [R, K] times the matrix, transposed; and what product.py's products have around it:

    squares, eps: rows are divided by their rms, as `normed_product`. silu: the matrix has 2 x N outputs, the result is
    silu(first N) * second N. gain, gained, new_squares: output += the product, and what the next norm wants of it, as
    `added_product`: new_squares is [R, blocks of N] fp32.
    """
    rows, inputs = x.shape
    outputs = output.shape[1]
    assert (matrix.outputs, matrix.inputs) == (outputs * (2 if silu else 1), inputs)
    width = tiles.outputs // (2 if silu else 1)
    assert not silu or outputs % width == 0
    assert len(matrix.words) % tiles.outputs == 0
    assert x.is_contiguous()
    assert output.is_contiguous()
    assert squares is None or squares.is_contiguous()
    blocks = triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, width)
    assert new_squares is None or new_squares.shape == (rows, blocks[1])
    assert tiles.splits == 1 or (
        blocks[0] * blocks[1] <= len(scratch.arrived) and rows * matrix.outputs * tiles.splits <= len(scratch.sums)
    )
    parts = 0 if squares is None else squares.shape[1]
    options = {"launch_pdl": True} if pdl else {}
    _grouped_product[(*blocks, tiles.splits)](
        x, matrix.words, matrix.scales, matrix.words if matrix.order is None else matrix.order,
        scratch.sums if squares is None else squares, output,
        x if gain is None else gain, output, output if gained is None else gained,
        scratch.sums if new_squares is None else new_squares, scratch.sums, scratch.arrived, rows, eps,
        N=outputs, K=inputs, KP=matrix.words.shape[1] * 16 // matrix.bits, P=matrix.plane,
        GROUP=matrix.group, BITS=matrix.bits, BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, SPLITS=tiles.splits,
        STAGES=tiles.stages, PARTS=parts, PARTS_P=triton.next_power_of_2(max(1, parts)),
        ORDERED=matrix.order is not None, ADD=gain is not None, SILU=silu,
        MANTISSA_BITS=MANTISSA.get(x.dtype, 0), ASM=x.is_cuda,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip


@triton.jit
def _plain(
    words, scales, order, output, K: tl.constexpr, KP: tl.constexpr, N, P: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N, units)."""
    PLACES: tl.constexpr = 16 // BITS
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    place = tl.arange(0, P)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    WIDTH: tl.constexpr = KP // PLACES
    ROW: tl.constexpr = P if BITS == 4 else WIDTH
    STEP: tl.constexpr = 8 * P if BITS == 4 else P
    block = (out // 8).to(tl.int64)
    codes = tl.load(words + (block * (8 * WIDTH) + out % 8 * ROW)[:, None] + unit * STEP + place[None, :])
    for number in tl.static_range(PLACES):
        group = (unit * PLACES + number) * P // GROUP
        scale, zero = _scale_and_zero(scales + (block * (KP // GROUP) + group) * 8 + out % 8, BITS)
        value = _numbers(codes, zero, number, BITS, 0, tl.float32) * scale
        column = (unit * PLACES + number) * P + place
        here = (out < N)[:, None] & (column < K)[None, :]
        if ORDERED:
            column = tl.load(order + column, mask=column < K, other=0)
        tl.store(output + out.to(tl.int64)[:, None] * K + column[None, :], value.to(output.dtype.element_ty), mask=here)


def plain_matrix(matrix: GroupedCodes, dtype: torch.dtype, *, pdl: bool) -> Tensor:
    """[outputs, inputs] in `dtype`."""
    output = torch.empty((matrix.outputs, matrix.inputs), dtype=dtype, device=matrix.words.device)
    width = matrix.words.shape[1]
    options = {"launch_pdl": True} if pdl else {}
    _plain[(triton.cdiv(matrix.outputs, 64), width // matrix.plane)](
        matrix.words, matrix.scales, matrix.words if matrix.order is None else matrix.order, output, K=matrix.inputs,
        KP=width * 16 // matrix.bits,
        N=matrix.outputs, P=matrix.plane, GROUP=matrix.group, BITS=matrix.bits, BLOCK=64,
        ORDERED=matrix.order is not None, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
    return output
