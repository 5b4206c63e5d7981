"""Products of a few rows with a matrix, which is read once: what a decode step of 1 to 4 rows consists of.

A program takes some rows of the matrix whole, in registers; where the card can, they are on their way before the kernel
before this one has ended. RMSNorm of the input is folded in: sum(x * gain * w) / rms(x), both sums in one pass.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox, send_block


@triton.jit(do_not_specialize=["rank"])
def _gemv(
    x, matrix, gain, addend, output, regions, calls, inbox, size, rank, N, eps, K: tl.constexpr, KP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
    SILU: tl.constexpr, SEND: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program BLOCK outputs of all ROWS. KP: K rounded up to a power of two. EVEN: nothing lies outside. inbox,
    size: as in `_all_reduce_small`."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, KP)
    if EVEN:
        inside = None
        other = None
    else:
        inside = (out < N)[:, None] & (column < K)[None, :]
        other = 0.0
    place = out.to(tl.int64)[:, None] * K + column[None, :]
    if PDL:
        gdc_launch_dependents()
    weights = tl.load(matrix + place, mask=inside, other=other, eviction_policy="evict_first")
    if SILU:
        up_weights = tl.load(
            matrix + N.to(tl.int64) * K + place, mask=inside, other=other, eviction_policy="evict_first"
        )
    if NORM:
        gains = tl.load(gain + column, mask=column < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    for row in tl.static_range(ROWS):
        value = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
        factor = 1.0
        if NORM:
            factor = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
            value = value * gains
        total = tl.sum(weights.to(tl.float32) * value[None, :], 1) * factor
        if SILU:
            up = tl.sum(up_weights.to(tl.float32) * value[None, :], 1) * factor
            total = total / (1.0 + tl.exp(-total)) * up
        line = row * N + out
        if ADD:
            total += tl.load(addend + line, mask=out < N, other=0.0).to(tl.float32)
        result = total.to(output.dtype.element_ty)
        if SEND:
            one = tl.zeros([1], tl.int32)
            send_block(
                regions, calls, inbox, size, result[None, :], row + one, one == 0, tl.program_id(0), N, rank, 1, BLOCK,
                BLOCK, RANKS,
            )  # fmt: skip
        else:
            tl.store(output + line, result, mask=out < N)


def gemv(
    x: Tensor,
    matrix: Tensor,
    output: Tensor,
    *,
    pdl: bool,
    block: int,
    warps: int,
    gain: Tensor | None = None,
    eps: float = 0.0,
    addend: Tensor | None = None,
    silu: bool = False,
    outbox: Outbox | None = None,
) -> None:
    """output [R, N] = x [R, K] times matrix [N, K], transposed; one of these at most around it:

    gain: [K], x is x / rms(x) * gain; eps is added to the mean of squares. addend: [R, N], added; may be `output`.
    silu: matrix is [2 x N, K], and the result silu(first N) * second N; goes with gain. outbox: as of `rank_product`,
    but not beside this; block is even then.
    """
    rows, inputs = x.shape
    outputs = output.shape[1]
    assert matrix.shape == (outputs * (2 if silu else 1), inputs)
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    assert output.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    regions, calls = (x, x) if outbox is None else (outbox.regions, outbox.calls)
    inbox, size = (0, 0) if outbox is None else outbox.words
    assert outbox is None or (outbox.takes(output.numel(), output.dtype) and block % 2 == 0)
    _gemv[(triton.cdiv(outputs, block),)](
        x, matrix, x if gain is None else gain, x if addend is None else addend, output, regions, calls,
        inbox, size, 0 if outbox is None else outbox.rank, outputs, eps,
        K=inputs, KP=triton.next_power_of_2(inputs), BLOCK=block, ROWS=rows,
        EVEN=outputs % block == 0 and triton.next_power_of_2(inputs) == inputs, NORM=gain is not None,
        ADD=addend is not None, SILU=silu, SEND=outbox is not None,
        RANKS=1 if outbox is None else len(outbox.regions), PDL=pdl, num_warps=warps, **options,
    )  # fmt: skip
