"""Products of up to some hundred rows with a rank's part of a wide matrix.

What a product adds to the time in which its matrix is read is mostly its beginning and end. So all programs fit on the
card at once: the matrix's outputs are cut in blocks, and the inputs in as many splits as there is room for. The last
split of a block to arrive adds the others up, in order, so that the same input gives the same bits. While the kernel
before this one ends (the sum over the ranks, say), the first lines of the matrix come to the second-level cache.

A product whose result is to be summed over the ranks sends each block to all of them as soon as it is there, and the
sum (all_reduce.py) has only to receive. That begins beside the product, and needs not wait for its very end.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox, send_block
from vibe_sgl_lite.model_worker.gpu.kernels.product import LINE, ProductScratch, prefetch


@dataclass(frozen=True)
class ProductCut:
    """How a product is cut. rows, outputs: of a block; inputs: a step's; splits: of the inputs; warps and pipeline
    stages of a program. matrix_first: the matrix's rows are those of the matrix instruction, which has 64 at least.
    early: lines, of 128 bytes, of each of its rows of the matrix that a program asks for before it waits. span: outputs
    that a block really has, where these are fewer.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int
    matrix_first: bool = False
    early: int = 0
    span: int = 0

    @property
    def width(self) -> int:
        return self.span or self.outputs


@triton.jit(do_not_specialize=["rows", "splits", "early", "rank"])
def _rank_product(
    x, matrix, output, sums, arrived, regions, calls, inbox, size, rows, N, K, splits, early, rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr, MATRIX_FIRST: tl.constexpr, SEND: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of N, splits). inbox, size: as in `_all_reduce_small`."""
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    own = lane < SPAN
    out = tl.program_id(1) * SPAN + lane
    split = tl.program_id(2)
    real = line < rows
    steps = K // BLOCK_K
    first, last = steps * split // splits, steps * (split + 1) // splits
    if PDL:
        if not SEND:
            gdc_launch_dependents()
        if tl.program_id(0) == 0:
            for number in range(0, early):
                place = matrix + tl.minimum(out, N - 1) * K + first * BLOCK_K + number * LINE
                prefetch(place)
                if SILU:
                    prefetch(place + N * K)
        gdc_wait()
        if SEND:  # the sum begins beside this, and reads what all kernels before this one have left
            gdc_launch_dependents()
    if MATRIX_FIRST:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(x + line[:, None] * K + column[None, :], mask=real[:, None], other=0.0)
        if SPAN == BLOCK_N:
            w = tl.load(matrix + out[:, None] * K + column[None, :])
        else:
            w = tl.load(matrix + out[:, None] * K + column[None, :], mask=own[:, None], other=0.0)
        if MATRIX_FIRST:
            total = tl.dot(w, a.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(a, w.T, total, input_precision=PRECISION)
        if SILU:
            if SPAN == BLOCK_N:
                w = tl.load(matrix + (out + N)[:, None] * K + column[None, :])
            else:
                w = tl.load(matrix + (out + N)[:, None] * K + column[None, :], mask=own[:, None], other=0.0)
            if MATRIX_FIRST:
                up = tl.dot(w, a.T, up, input_precision=PRECISION)
            else:
                up = tl.dot(a, w.T, up, input_precision=PRECISION)
    if MATRIX_FIRST:
        total, up = total.T, up.T
    here = real[:, None] & own[None, :]
    place = line[:, None] * N + out[None, :]
    is_last = splits == 1
    if splits > 1:
        part_size = rows * N
        tl.store(sums + split * part_size + place, total, mask=here)
        tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        is_last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == splits - 1
        if is_last:
            total = tl.load(sums + place, mask=here, other=0.0, cache_modifier=".cg")
            for part in range(1, splits):
                total += tl.load(sums + part * part_size + place, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(arrived + block, 0)
    if is_last:
        if SILU:
            total = total / (1.0 + tl.exp(-total)) * up
        result = total.to(output.dtype.element_ty)
        if SEND:
            send_block(
                regions, calls, inbox, size, result, line, real, tl.program_id(1), N, rank, BLOCK_M, BLOCK_N, SPAN,
                RANKS,
            )  # fmt: skip
        else:
            tl.store(output + place, result, mask=here)


def rank_product(
    x: Tensor,
    matrix: Tensor,
    output: Tensor,
    cut: ProductCut,
    scratch: ProductScratch,
    *,
    pdl: bool,
    silu: bool = False,
    outbox: Outbox | None = None,
) -> None:
    """output [R, N] = x [R, K] times matrix [N, K], transposed.

    silu: matrix is [2 x N, K], and the result silu(first N) * second N; the cut then has one split. outbox: the result
    is sent to all ranks instead, and the next call of all is the `all_reduce` of it that takes it as sent beside this.
    """
    (rows, inputs), outputs = x.shape, output.shape[1]
    assert matrix.shape == (outputs * (2 if silu else 1), inputs)
    assert cut.splits == 1 or not silu
    assert matrix.numel() < 1 << 31
    assert outputs % cut.width == 0
    assert inputs % cut.inputs == 0
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    assert output.is_contiguous()
    blocks = triton.cdiv(rows, cut.rows), outputs // cut.width
    assert cut.splits == 1 or (
        blocks[0] * blocks[1] <= len(scratch.arrived) and rows * outputs * cut.splits <= len(scratch.sums)
    )
    options = {"launch_pdl": True} if pdl else {}
    regions, calls = (scratch.arrived, scratch.arrived) if outbox is None else (outbox.regions, outbox.calls)
    assert outbox is None or outbox.takes(output.numel(), output.dtype)
    inbox, size = (0, 0) if outbox is None else outbox.words
    _rank_product[(*blocks, cut.splits)](
        x, matrix, output, scratch.sums, scratch.arrived, regions, calls, inbox, size, rows, outputs, inputs,
        cut.splits, cut.early, 0 if outbox is None else outbox.rank,
        BLOCK_M=cut.rows, BLOCK_N=cut.outputs, SPAN=cut.width, BLOCK_K=cut.inputs,
        STAGES=cut.stages, SILU=silu, MATRIX_FIRST=cut.matrix_first, SEND=outbox is not None,
        RANKS=1 if outbox is None else len(outbox.regions),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=cut.warps, num_stages=cut.stages,
        **options,
    )  # fmt: skip
