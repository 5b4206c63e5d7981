"""Products of up to some hundred rows with a matrix, with what lies between two of a layer's products folded in.

RMSNorm over the residual stream costs no kernel of its own: the product that ends a block writes the sum, the sum times
the next norm's gain, and of each tile the sum of squares; the one that begins the next block multiplies the second and
divides its rows by the rms. Where tiles are too few to fill the card, their inputs are cut in splits, and the last one
to arrive adds the others up, in order, so that the same input gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles, cluster_product

LINE = tl.constexpr(64)  # elements of a line of the second-level cache, of 16 bits


@dataclass(frozen=True)
class ProductTiles:
    """How a product is cut. rows, outputs: of a tile; inputs: a step's; splits: of the inputs; warps and pipeline
    stages of a program. matrix_first: the matrix's rows are those of the matrix instruction, which has 64 at least.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int
    matrix_first: bool = False

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a matrix [outputs, inputs] has whole tiles alone."""
        return outputs % self.outputs == 0 and inputs % (self.inputs * self.splits) == 0


AnyTiles = ProductTiles | ClusterTiles


class ProductScratch:
    """What splits leave for the one that adds them up. One for all products: they follow each other."""

    def __init__(self, device: torch.device, sums: int, tiles: int) -> None:
        """sums: the most rows x outputs x splits of a product; tiles: the most of one that is split."""
        self.sums = torch.empty(sums, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)  # zero between launches


@triton.jit
def prefetch(pointers):
    """Bring the lines that these lie in to the second-level cache, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64, bitcast=True)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _product(
    x, matrix, squares, addend, gain, output, gained, new_squares, sums, arrived, rows, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr,
    MATRIX_FIRST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of N, SPLITS). PARTS: of each row's sum of squares in `squares`; 0: without them."""
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    real = line < rows
    first = split * (K // SPLITS)
    if PDL:
        gdc_launch_dependents()
        # While the kernel before this one still runs. For gate and up it was of no use.
        if not SILU and (K // SPLITS) % (4 * LINE) == 0 and tl.program_id(0) == 0:
            lines = tl.arange(0, 4) * LINE
            for start in range(0, K // SPLITS, 4 * LINE):
                prefetch(matrix + out[:, None] * K + first + start + lines[None, :])
        gdc_wait()
    if MATRIX_FIRST:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K // SPLITS, BLOCK_K, num_stages=STAGES):
        column = first + start + tl.arange(0, BLOCK_K)
        a = tl.load(x + line[:, None] * K + column[None, :], mask=real[:, None], other=0.0)
        w = tl.load(matrix + out[:, None] * K + column[None, :])
        if MATRIX_FIRST:
            total = tl.dot(w, a.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(a, w.T, total, input_precision=PRECISION)
        if SILU:
            w = tl.load(matrix + (out + N)[:, None] * K + column[None, :])
            if MATRIX_FIRST:
                up = tl.dot(w, a.T, up, input_precision=PRECISION)
            else:
                up = tl.dot(a, w.T, up, input_precision=PRECISION)
    if MATRIX_FIRST:
        place = line[None, :] * N + out[:, None]
        here = real[None, :] & (out < N)[:, None]
    else:
        place = line[:, None] * N + out[None, :]
        here = real[:, None] & (out < N)[None, :]
    is_last = True
    if SPLITS > 1:
        size = rows * N
        tl.store(sums + split * size + place, total, mask=here)
        tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.load(sums + place, mask=here, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                total += tl.load(sums + part * size + place, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if is_last:
        if PARTS > 0:
            part = tl.arange(0, PARTS)
            squared = tl.load(squares + line[:, None] * PARTS + part[None, :], mask=real[:, None], other=0.0)
            factor = tl.rsqrt(tl.sum(squared, 1) / K + eps)
            if MATRIX_FIRST:
                total = total * factor[None, :]
                up = up * factor[None, :]
            else:
                total = total * factor[:, None]
                up = up * factor[:, None]
        if SILU:
            total = total / (1.0 + tl.exp(-total)) * up
        if ADD:
            total += tl.load(addend + place, mask=here, other=0.0).to(tl.float32)
        result = total.to(output.dtype.element_ty)
        tl.store(output + place, result, mask=here)
        if ADD:
            wide = result.to(tl.float32)
            gains = tl.load(gain + out).to(tl.float32)
            if MATRIX_FIRST:
                square = tl.sum(wide * wide, 0)
                wide = wide * gains[:, None]
            else:
                square = tl.sum(wide * wide, 1)
                wide = wide * gains[None, :]
            tl.store(gained + place, wide.to(gained.dtype.element_ty), mask=here)
            tl.store(new_squares + line * tl.num_programs(1) + tl.program_id(1), square, mask=real)


def _launch(
    x: Tensor,
    matrix: Tensor,
    output: Tensor,
    tiles: AnyTiles,
    scratch: ProductScratch,
    *,
    pdl: bool,
    squares: Tensor | None = None,
    eps: float = 0.0,
    addend: Tensor | None = None,
    gain: Tensor | None = None,
    gained: Tensor | None = None,
    new_squares: Tensor | None = None,
    silu: bool = False,
) -> None:
    rows, inputs = x.shape
    outputs = output.shape[1]
    if isinstance(tiles, ClusterTiles):
        cluster_product(
            x, matrix, output, tiles, pdl=pdl, squares=squares, eps=eps, addend=addend, gain=gain, gained=gained,
            new_squares=new_squares, silu=silu,
        )  # fmt: skip
        return
    assert matrix.shape == (outputs * (2 if silu else 1), inputs)
    assert tiles.fits(outputs, inputs)
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    assert output.is_contiguous()
    blocks = triton.cdiv(rows, tiles.rows), outputs // tiles.outputs
    assert tiles.splits == 1 or (
        blocks[0] * blocks[1] <= len(scratch.arrived) and rows * outputs * tiles.splits <= len(scratch.sums)
    )
    options = {"launch_pdl": True} if pdl else {}
    _product[(*blocks, tiles.splits)](
        x, matrix, scratch.sums if squares is None else squares, x if addend is None else addend,
        x if gain is None else gain, output, output if gained is None else gained,
        scratch.sums if new_squares is None else new_squares, scratch.sums, scratch.arrived, rows, eps,
        N=outputs, K=inputs, BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.inputs, SPLITS=tiles.splits,
        STAGES=tiles.stages, PARTS=0 if squares is None else squares.shape[1], ADD=addend is not None, SILU=silu,
        MATRIX_FIRST=tiles.matrix_first, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip


def plain_product(x: Tensor, matrix: Tensor, output: Tensor, tiles: ProductTiles, *, pdl: bool) -> None:
    """output [R, N] = x [R, K] times matrix [N, K], transposed. tiles have one split."""
    assert tiles.splits == 1
    _launch(x, matrix, output, tiles, ProductScratch(x.device, 1, 1), pdl=pdl)


def normed_product(
    gained: Tensor,
    squares: Tensor,
    eps: float,
    matrix: Tensor,
    output: Tensor,
    tiles: AnyTiles,
    scratch: ProductScratch,
    *,
    pdl: bool,
    silu: bool = False,
) -> None:
    """output [R, N] = rms_norm(stream) times matrix [N, K], transposed.

    gained: [R, K], the stream times the norm's gain. squares: [R, parts] fp32, parts a power of two, whose sums are
    the stream's sums of squares. silu: matrix is [2 x N, K], and the result silu(first N) * second N; `ProductTiles`
    then have one split.
    """
    assert squares.is_contiguous()
    assert tiles.splits == 1 or not silu or isinstance(tiles, ClusterTiles)
    _launch(gained, matrix, output, tiles, scratch, pdl=pdl, squares=squares, eps=eps, silu=silu)


def added_product(
    x: Tensor,
    matrix: Tensor,
    stream: Tensor,
    gain: Tensor,
    gained: Tensor,
    squares: Tensor,
    tiles: AnyTiles,
    scratch: ProductScratch,
    *,
    pdl: bool,
) -> None:
    """stream [R, N] += x [R, K] times matrix [N, K], transposed; and what `normed_product` wants of that: gained [R, N]
    with the next norm's gain, [N], and squares, [R, N / tiles.outputs] fp32."""
    assert gained.is_contiguous()
    assert squares.is_contiguous()
    assert squares.shape == (len(x), stream.shape[1] // tiles.outputs)
    _launch(
        x, matrix, stream, tiles, scratch, pdl=pdl, addend=stream, gain=gain, gained=gained, new_squares=squares
    )  # fmt: skip


@triton.jit
def _begin_stream(
    stream, gain, gained, squares, N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr
):
    """A program a row."""
    column = tl.arange(0, NP)
    inside = column < N
    gains = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(stream + row * N + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(gained + row * N + column, (value * gains).to(gained.dtype.element_ty), mask=inside)
    part = tl.arange(0, PARTS)
    tl.store(squares + row * PARTS + part, tl.where(part == 0, tl.sum(value * value, 0), 0.0))


def begin_stream(stream: Tensor, gain: Tensor, gained: Tensor, squares: Tensor, *, pdl: bool) -> None:
    """What `added_product` leaves for the first norm, of a stream [R, N] that is there: gained and squares."""
    rows, columns = stream.shape
    assert stream.is_contiguous()
    assert gained.is_contiguous()
    assert squares.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    _begin_stream[(rows,)](
        stream, gain, gained, squares, N=columns, NP=triton.next_power_of_2(columns), PARTS=squares.shape[1], PDL=pdl,
        num_warps=4, **options,
    )  # fmt: skip
