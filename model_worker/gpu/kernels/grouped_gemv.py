"""The product of one row with a matrix of codes that share scales, which is read once: what decode steps consist of.

A program takes 16 outputs with all of their inputs. Its warps share the inputs: a batch of small products, one
for each unit of inputs (grouped_product.py), goes through the matrix units, and what the units' scales make of them is
added up at the end.

Where inputs are few enough, their codes are on their way, to registers, before the kernel before this one has ended.
Where they are more, some programs share them; the last one to arrive adds up, in order, so that bits are the same each
time. Where tiles, too, are many, they come through shared memory, the next ones while these are multiplied.

A code is not brought to its own value: in the last bits of a number's mantissa it is worth a constant more, and the
inputs' sum says what all constants and the zero of the group made of it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.grouped_operands import (
    BLOCKS,
    COLUMNS,
    block_of,
    columns,
    factors,
    group,
    lanes,
    spread,
    x_group,
)
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import MANTISSA, GroupedCodes
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch, prefetch

GEMV_OUTPUTS = 16  # of a tile
LINE = tl.constexpr(64)  # 16-bit words of a line of the second-level cache


@dataclass(frozen=True)
class GemvTiles:
    """How a product is cut. units: of inputs that are under way at once; warps of a program; programs that share the
    tiles of 16 outputs, 0: one each, as where inputs are more units or are added; registers: of a thread at most, 0: as
    many as the compiler wants; stages: tiles, or units, that are under way; splits: programs that share the inputs of a
    tile, each of which then has all of its own at once."""

    units: int
    warps: int
    programs: int = 0
    registers: int = 0
    stages: int = 3
    splits: int = 1


@triton.jit
def _sums(
    words, scales, x, order, tile, begin, given_words, given_factors, given_x, given_raised, C: tl.constexpr,
    GIVEN: tl.constexpr, RAISED_GIVEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, UNITS: tl.constexpr,
    P: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr,
    SILU: tl.constexpr, ORDERED: tl.constexpr, MANTISSA_BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[WARPS, 16, COLUMNS]: what C units from `begin` on, all of one warp together, make of a tile's outputs. GIVEN:
    words, the first factors and the inputs are there already; RAISED_GIVEN: the inputs' sums are."""
    UNIT: tl.constexpr = P * (16 // BITS)
    GROUPS: tl.constexpr = UNIT // GROUP
    RAISED: tl.constexpr = 2**MANTISSA_BITS if MANTISSA_BITS > 0 else 0
    dtype: tl.constexpr = x.dtype.element_ty
    codes = given_words if GIVEN else lanes(words, tile, begin, 0, C, N, UNITS, P, BITS, WARPS, SILU)
    if P > 32:
        more = lanes(words, tile, begin, 1, C, N, UNITS, P, BITS, WARPS, SILU)
        codes = tl.reshape(tl.permute(tl.join(codes, more), (0, 1, 3, 2)), [C, 16, P])
    total = tl.zeros([WARPS, 16, COLUMNS], tl.float32)
    zeros = tl.zeros([C, 16, COLUMNS], tl.float32)
    for part in tl.static_range(GROUPS):
        if GIVEN and part == 0:
            factor_of = given_factors
        else:
            factor_of = factors(scales, tile, begin, part, C, N, UNITS, GROUPS, WARPS, SILU)
        factor = spread(factor_of, C, WARPS)
        a = given_x[part] if GIVEN else x_group(x, order, begin, C, part, K, P, GROUP, UNIT, ORDERED, UNITS)
        numbers = group(codes, part, P, GROUP, BITS, MANTISSA_BITS, dtype)
        some = tl.dot(numbers, columns(a), zeros, input_precision=PRECISION)
        if BITS == 4:
            raised = given_raised[part] if RAISED_GIVEN else _sum_of_x(a, P, PRECISION)
            some -= raised * ((factor >> 16).to(tl.float32) + RAISED)
            factor = factor.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # Unit u is warp u % WARPS's: no sum over warps as yet.
        total += tl.sum(tl.reshape(some * factor, [C // WARPS, WARPS, 16, COLUMNS]), 0)
    return total


@triton.jit
def _sum_of_x(a, P: tl.constexpr, PRECISION: tl.constexpr):
    """[C, 16, COLUMNS], 16 times the same: the sums of [C, GROUP] over a group, by the matrix units. A group of 128 or
    more goes through them as COLUMNS columns or more, which are added up after that: an eighth of the instructions."""
    C: tl.constexpr = a.shape[0]
    GROUP: tl.constexpr = a.shape[1]
    if GROUP >= 16 * COLUMNS:
        b = tl.permute(tl.reshape(a, [C, GROUP // 16, 4, 2, 2]), (0, 3, 2, 4, 1))
        b = tl.reshape(b, [C, 16, GROUP // 16])
        ones = tl.full([C, 16, 16], 1.0, a.dtype)
        some = tl.dot(ones, b, tl.zeros([C, 16, GROUP // 16], tl.float32), input_precision=PRECISION)
        sums = tl.broadcast_to(tl.sum(some, 2)[:, :, None], [C, 16, COLUMNS])
    else:
        if GROUP == P:
            ones = tl.full([C, 16, GROUP], 1.0, a.dtype)
        else:  # so that the compiler lays them out as the numbers, which are joined, too
            half = tl.full([C, 16, GROUP // 2], 1.0, a.dtype)
            ones = tl.reshape(tl.permute(tl.join(half, half), (0, 1, 3, 2)), [C, 16, GROUP])
        sums = tl.dot(ones, columns(a), tl.zeros([C, 16, COLUMNS], tl.float32), input_precision=PRECISION)
    return sums


@triton.jit
def _of_warps(total):
    """[outputs]: what the warps have, added up."""
    first = tl.where(tl.arange(0, COLUMNS)[None, None, :] == 0, total, 0.0)
    return tl.sum(tl.sum(first, 2), 0)


@triton.jit
def _finish(
    total, factor_of_row, added, gains, output, gained, new_squares, tile, N: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Store what becomes of a tile's outputs."""
    result = total
    if NORM:
        result = result * factor_of_row
    if SILU:
        gate, up = tl.split(tl.trans(tl.reshape(result, [2, WIDTH])))
        result = gate / (1.0 + tl.exp(-gate)) * up
    out = tile * WIDTH + tl.arange(0, WIDTH)
    if ADD:
        result += added
    result = result.to(output.dtype.element_ty)
    tl.store(output + out, result, mask=out < N)
    if ADD:
        wide = tl.where(out < N, result.to(tl.float32), 0.0)
        tl.store(gained + out, (wide * gains).to(gained.dtype.element_ty), mask=out < N)
        tl.store(new_squares + tile, tl.sum(wide * wide, 0))


@triton.jit
def _bring_near(
    words, tile, begin: tl.constexpr, C: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr, P: tl.constexpr,
    BITS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """What C units of a tile are, to the second-level cache."""
    line = tl.arange(0, C * P * 8 // LINE)
    if BITS == 4:
        spot = begin * 8 * P + line * LINE
        near = spot < UNITS * 8 * P
    else:
        EACH: tl.constexpr = C * P // LINE  # lines of an output
        within = begin * P + line % EACH * LINE
        near = within < UNITS * P
        spot = line // EACH * (UNITS * P) + within
    for number in tl.static_range(BLOCKS):
        prefetch(words + block_of(tile, number, N, SILU) * (UNITS * 8 * P) + tl.where(near, spot, 0))


@triton.jit
def _grouped_gemv(
    x, words, scales, order, squares, addend, gain, output, gained, new_squares, sums, arrived, eps, N: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    CHUNK: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, PARTS_P: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr,
    SILU: tl.constexpr, MANTISSA_BITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PROGRAMS share TILES of 16 of the matrix's outputs; with SILU 8 are of each half. CHUNK: units
    at once; a tile's are cut in SPLITS, of which the last one to arrive adds the others' up, in order. MANTISSA_BITS: 0
    without instructions for two numbers."""
    UNIT: tl.constexpr = P * (16 // BITS)
    UNITS: tl.constexpr = KP // UNIT
    GROUPS: tl.constexpr = UNIT // GROUP
    ALONE: tl.constexpr = CHUNK * SPLITS >= UNITS and PROGRAMS == TILES  # all that a program reads is in registers
    WIDTH: tl.constexpr = 8 if SILU else 16
    tl.static_assert(SPLITS == 1 or ALONE)
    tile = tl.program_id(0) // SPLITS
    first = tl.program_id(0) % SPLITS * CHUNK
    given_words = 0
    given_factors = 0
    if PDL:
        gdc_launch_dependents()
    if ALONE:
        given_words = lanes(words, tile, first, 0, CHUNK, N, UNITS, P, BITS, WARPS, SILU)
        given_factors = factors(scales, tile, first, 0, CHUNK, N, UNITS, GROUPS, WARPS, SILU)
    elif PDL:
        # All of the first tile, as the second-level cache has room for those of all programs.
        for begin in tl.static_range(0, UNITS, CHUNK):
            _bring_near(words, tile, begin, CHUNK, N, UNITS, P, BITS, SILU)
    if PDL:
        gdc_wait()
    factor_of_row = 0.0
    if PARTS > 0:
        part_of = tl.arange(0, PARTS_P)
        squared = tl.load(squares + part_of, mask=part_of < PARTS, other=0.0)
    added = 0.0
    gains = 0.0
    if ADD:
        tl.static_assert(PROGRAMS == TILES)
        out = tile * WIDTH + tl.arange(0, WIDTH)
        added = tl.load(addend + out, mask=out < N, other=0.0).to(tl.float32)
        gains = tl.load(gain + out, mask=out < N, other=0.0).to(tl.float32)
    kept_x = ()
    raised = ()
    if CHUNK * SPLITS >= UNITS:
        for part in tl.static_range(GROUPS):
            a = x_group(x, order, first, CHUNK, part, K, P, GROUP, UNIT, ORDERED, UNITS)
            kept_x += (a,)  # type: ignore[assignment]
            if BITS == 4:
                raised += (_sum_of_x(a, P, PRECISION),)  # type: ignore[assignment]
    if PARTS > 0:
        factor_of_row = tl.rsqrt(tl.sum(squared, 0) / K + eps)
    if ALONE:
        total = _sums(
            words, scales, x, order, tile, first, given_words, given_factors, kept_x, raised, CHUNK, True, True, N, K,
            UNITS, P, GROUP, BITS, WARPS, SILU, ORDERED, MANTISSA_BITS, PRECISION,
        )  # fmt: skip
        result = _of_warps(total)
        is_last = True
        if SPLITS > 1:
            place = sums + tile * (SPLITS * 16) + tl.arange(0, 16)
            tl.store(place + tl.program_id(0) % SPLITS * 16, result)
            tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
            is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
            if is_last:
                result = tl.load(place, cache_modifier=".cg")
                for part in tl.static_range(1, SPLITS):
                    result += tl.load(place + part * 16, cache_modifier=".cg")
                tl.store(arrived + tile, 0)
        if is_last:
            _finish(
                result, factor_of_row, added, gains, output, gained, new_squares, tile, N, WIDTH, PARTS > 0, ADD, SILU
            )
    elif CHUNK >= UNITS:  # the inputs come anew with each tile: in registers they would leave room for fewer programs
        for each in tl.range(tile, TILES, PROGRAMS, num_stages=STAGES):
            total = _sums(
                words, scales, x, order, each, 0, 0, 0, (), raised, CHUNK, False, True, N, K, UNITS, P, GROUP, BITS,
                WARPS, SILU, ORDERED, MANTISSA_BITS, PRECISION,
            )  # fmt: skip
            _finish(
                _of_warps(total), factor_of_row, added, gains, output, gained, new_squares, each, N, WIDTH, PARTS > 0,
                ADD, SILU,
            )  # fmt: skip
    else:
        tl.static_assert(PROGRAMS == TILES)
        total = tl.zeros([WARPS, 16, COLUMNS], tl.float32)
        for begin in tl.range(0, UNITS, CHUNK, num_stages=STAGES):
            total += _sums(
                words, scales, x, order, tile, begin, 0, 0, (), (), CHUNK, False, False, N, K, UNITS, P, GROUP, BITS,
                WARPS, SILU, ORDERED, MANTISSA_BITS, PRECISION,
            )  # fmt: skip
        _finish(
            _of_warps(total), factor_of_row, added, gains, output, gained, new_squares, tile, N, WIDTH, PARTS > 0, ADD,
            SILU,
        )  # fmt: skip


def takes_rows(x: Tensor) -> bool:
    """Whether `grouped_gemv` is for such rows. fp32, of a card, has no place in its shared memory."""
    return len(x) == 1 and (x.element_size() == 2 or not x.is_cuda)


def grouped_gemv(
    x: Tensor,
    matrix: GroupedCodes,
    output: Tensor,
    tiles: GemvTiles,
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
    """output [1, N] = x [1, K] times the matrix, transposed; around it what `grouped_product` has, new_squares being
    [1, tiles]."""
    outputs = output.shape[1]
    assert len(x) == len(output) == 1
    assert (matrix.outputs, matrix.inputs) == (outputs * (2 if silu else 1), x.shape[1])
    width = GEMV_OUTPUTS // (2 if silu else 1)
    assert not silu or outputs % width == 0
    assert x.is_contiguous()
    assert output.is_contiguous()
    assert squares is None or squares.is_contiguous()
    blocks = triton.cdiv(outputs, width)
    shared = tiles.programs if tiles.units >= matrix.units and gain is None else 0
    assert tiles.splits == 1 or (
        not shared and tiles.splits == triton.cdiv(matrix.units, tiles.units) and blocks <= len(scratch.arrived)
        and blocks * tiles.splits * GEMV_OUTPUTS <= len(scratch.sums)
    )  # fmt: skip
    programs = min(blocks, shared or blocks)
    assert new_squares is None or new_squares.shape == (1, blocks)
    parts = 0 if squares is None else squares.shape[1]
    options: dict[str, int] = {"launch_pdl": True} if pdl else {}
    if tiles.registers:
        options["maxnreg"] = tiles.registers
    _grouped_gemv[(programs * tiles.splits,)](
        x, matrix.words, matrix.scales, matrix.words if matrix.order is None else matrix.order,
        x if squares is None else squares, output, x if gain is None else gain, output,
        output if gained is None else gained, output if new_squares is None else new_squares, scratch.sums,
        scratch.arrived, eps,
        N=outputs, K=matrix.inputs, KP=matrix.units * matrix.plane * 16 // matrix.bits, P=matrix.plane,
        GROUP=matrix.group, BITS=matrix.bits, CHUNK=tiles.units, WARPS=tiles.warps,
        TILES=blocks, PROGRAMS=programs, SPLITS=tiles.splits, STAGES=tiles.stages, PARTS=parts,
        PARTS_P=triton.next_power_of_2(max(1, parts)), ORDERED=matrix.order is not None, ADD=gain is not None,
        SILU=silu, MANTISSA_BITS=MANTISSA.get(x.dtype, 0) if x.is_cuda else 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=tiles.warps,
        num_stages=tiles.stages, **options,
    )  # fmt: skip
