"""Sums over the ranks of one machine through memory that all of them can read, and what follows such a sum in a layer.

Every rank has a region of the same layout (`Layout`). A program copies its rows to its own rank's region, tells the
programs of the same number on all ranks that they are there, waits for theirs, and reads the rows of all. With more
than two ranks and many rows, each rank first sums its share of the rows only, and all then read the sums. The sums are
in the order of the ranks, in fp32, and so the same bits on all of them.

A few rows are sent instead, into the regions of all ranks, this one's too, in words of four bytes. A word that is zero
is not there yet, and whoever has read one puts zero there again; so that no number is zero, the complements of its bits
are sent. (That of one word would be zero, two NaNs of bfloat16 or one of float32; it becomes that of other NaNs.) What
is gathered may be any bits, and is sent in words of eight bytes, half of each the call's number.

Two halves of a region are used in turn: who has heard of all ranks in a call knows that they are through with the one
before, and may write to what that one used in the call after this. Rows, and the numbers of programs, may differ from
call to call, but not from rank to rank. Nothing here gives up waiting: a rank that is gone stops the others for good.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_PROGRAMS = 512
FLAGS_BYTES = 1 << 18  # of a region, at its beginning: [2, MAX_PROGRAMS, ranks] int64, the number of the last call
MAX_RANKS = FLAGS_BYTES // (2 * MAX_PROGRAMS * 8)
MAX_COLUMNS = 16384
CALL = tl.constexpr(1 << 20)  # what a call's programs, which are fewer, add to the count of calls together
GATHER_BLOCK = 512  # words a program


@dataclass(frozen=True)
class Layout:
    """A region: the flags, then two halves of inputs and two of sums, of `half` bytes each; then, twice again, words
    for `small` bytes from each of so many ranks; and the same with numbers, for which they take twice the room."""

    half: int
    small: int
    ranks: int

    @property
    def words(self) -> int:
        """Where they begin."""
        return FLAGS_BYTES + 4 * self.half

    @property
    def nbytes(self) -> int:
        return self.numbered + 2 * self.ranks * 2 * self.small

    @property
    def numbered(self) -> int:
        """Where those with numbers begin."""
        return self.words + 2 * self.ranks * self.small

    def sends(self, count: int, dtype: torch.dtype) -> bool:
        """Whether a sum of so many numbers is of words."""
        return count * dtype.itemsize <= self.small and dtype in (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Outbox:
    """What a kernel needs that sends to the others what the next call will sum: see `all_reduce`."""

    regions: Tensor
    calls: Tensor
    layout: Layout
    rank: int

    def takes(self, count: int, dtype: torch.dtype) -> bool:
        """Whether so many numbers may be sent; all ranks say the same."""
        return self.layout.sends(count, dtype)

    @property
    def words(self) -> tuple[int, int]:
        """Where words begin in a region, and bytes of those of one rank."""
        return self.layout.words, self.layout.small


@triton.jit
def _tell_all(regions, place, call, RANKS: tl.constexpr, RANKS_P: tl.constexpr, ASM: tl.constexpr):
    """Set the int64 at offset `place` of all regions to `call`, behind everything that this program has written."""
    rank = tl.minimum(tl.arange(0, RANKS_P), RANKS - 1)
    flag = tl.load(regions + rank) + place
    if ASM:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.relaxed.sys.global.u64 [$1], $2; mov.u32 $0, 0;",
            "=r,l,l,~{memory}", [flag, call + tl.zeros_like(rank)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.atomic_xchg(flag.to(tl.pointer_type(tl.int64)), call + tl.zeros_like(rank), sem="release", scope="sys")


@triton.jit
def _wait_for_all(region, place, call, RANKS: tl.constexpr, RANKS_P: tl.constexpr, ASM: tl.constexpr):
    """Until the int64s at offset `place` and behind it, one a rank, have come to `call`; they may be beyond it."""
    rank = tl.minimum(tl.arange(0, RANKS_P), RANKS - 1)
    flag = region + place + rank * 8
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred early; .reg .s64 seen; AGAIN: ld.acquire.sys.global.s64 seen, [$1]; "
            "setp.lt.s64 early, seen, $2; @early bra AGAIN; mov.u32 $0, 0; }",
            "=r,l,l,~{memory}", [flag, call + tl.zeros_like(rank)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        pointer = flag.to(tl.pointer_type(tl.int64))
        missing = tl.min(tl.atomic_add(pointer, 0, sem="acquire", scope="sys") - call, 0)
        while missing < 0:
            missing = tl.min(tl.atomic_add(pointer, 0, sem="acquire", scope="sys") - call, 0)


@triton.jit
def _meet(
    regions, calls, phase, call, rank, RANKS: tl.constexpr, RANKS_P: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """With the programs of this number on all ranks; what they wrote before can be read after it."""
    place = (phase * MAX_PROGRAMS + tl.program_id(0)).to(tl.int64) * RANKS * 8
    tl.debug_barrier()
    _tell_all(regions, place + rank * 8, call, RANKS, RANKS_P, ASM)
    if phase == 0:  # while the others' word is on its way
        _count_call(calls)
    _wait_for_all(tl.load(regions + rank), place, call, RANKS, RANKS_P, ASM)
    tl.debug_barrier()


@triton.jit
def _sum(regions, start, inside, like, RANKS: tl.constexpr, NP: tl.constexpr):
    """fp32 [NP], what all regions have at their byte `start` and behind, in `like`'s dtype."""
    column = tl.arange(0, NP)
    total = tl.zeros([NP], tl.float32)
    for rank in tl.static_range(RANKS):
        line = tl.multiple_of((tl.load(regions + rank) + start).to(like.dtype), 16)
        total += tl.load(line + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _finish(
    value, old, residual, output, gain, at, inside, eps, N: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """What is done with a row of the sum, rounded to its dtype. old: what it is added to."""
    if ADD:
        wide = value.to(tl.float32) + old
        value = wide.to(output.dtype.element_ty)
        tl.store(residual + at, value, mask=inside)
    if NORM:
        wide = value.to(tl.float32)
        value = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + eps) * gain).to(output.dtype.element_ty)
    if NORM or not ADD:
        tl.store(output + at, value, mask=inside)


@triton.jit
def _number_of_call(calls):
    """From 1 on; the same for all of a call's programs, until the last of them has counted."""
    return tl.load(calls, cache_modifier=".cg") // CALL + 1


@triton.jit
def _count_call(calls):
    """By each of a call's programs, all of whose threads know its number."""
    programs = tl.num_programs(0)
    share = tl.where(tl.program_id(0) == 0, CALL - programs + 1, 1)
    tl.atomic_add(calls, share.to(tl.int64), sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=["rank"])
def _all_reduce(
    x, residual, weight, output, regions, calls, rank, rows, half, flags_bytes, eps, N: tl.constexpr, NP: tl.constexpr,
    RANKS: tl.constexpr, RANKS_P: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    TWO_SHOT: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program every num_programs-th row. regions: [RANKS] int64 addresses. calls: how many calls there were, times
    CALL. NP: N rounded up to a power of two."""
    column = tl.arange(0, NP)
    inside = column < N
    first, step = tl.program_id(0), tl.num_programs(0)
    gain = 1.0
    if NORM:
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    call = _number_of_call(calls)
    inputs = flags_bytes + (call & 1) * half
    sums = inputs + 2 * half
    width: tl.constexpr = N * (x.dtype.element_ty.primitive_bitwidth // 8)
    mine = tl.load(regions + rank)
    for row in range(first, rows, step):
        line = tl.multiple_of((mine + inputs + row * width).to(x.dtype), 16)
        tl.store(line + column, tl.load(x + row * N + column, mask=inside), mask=inside)
    _meet(regions, calls, 0, call, rank, RANKS, RANKS_P, MAX_PROGRAMS, ASM)
    if TWO_SHOT:
        for row in range(first + rank * step, rows, RANKS * step):
            total = _sum(regions, inputs + row * width, inside, x, RANKS, NP)
            line = tl.multiple_of((mine + sums + row * width).to(x.dtype), 16)
            tl.store(line + column, total.to(x.dtype.element_ty), mask=inside)
        _meet(regions, calls, 1, call, rank, RANKS, RANKS_P, MAX_PROGRAMS, ASM)
    for row in range(first, rows, step):
        at = row * N + column
        old = 0.0
        if ADD:
            old = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if TWO_SHOT:
            owner = tl.load(regions + row // step % RANKS)
            line = tl.multiple_of((owner + sums + row * width).to(x.dtype), 16)
            value = tl.load(line + column, mask=inside, other=0.0, cache_modifier=".cg")
        else:
            total = _sum(regions, inputs + row * width, inside, x, RANKS, NP)
            value = total.to(x.dtype.element_ty)
        _finish(value, old, residual, output, gain, at, inside, eps, N, ADD, NORM)


@triton.jit
def _send(regions, start, words, place, there, rank, RANKS: tl.constexpr):
    """Words, int32 or int64, to all ranks' regions, this one's last, from their byte `start` on."""
    for turn in tl.static_range(1, RANKS + 1):
        line = (tl.load(regions + (rank + turn) % RANKS) + start).to(tl.pointer_type(words.dtype))
        tl.store(tl.multiple_of(line, 16) + place, words, mask=there)


@triton.jit
def _send_words(regions, start, words, place, there, rank, RANKS: tl.constexpr):
    """int32, for `_receive`."""
    sent = ~words
    _send(regions, start, tl.where(sent == 0, -2147483648, sent), place, there, rank, RANKS)


@triton.jit
def send_block(
    regions, calls, inbox, size, result, line, real, block, N, rank, M: tl.constexpr, WIDTH: tl.constexpr,
    SPAN: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Send what the next call sums: result, [M, WIDTH], of which SPAN columns are block number `block` of those rows
    `line` that are `real`, N wide. inbox, size: `first` and `size` of `_all_reduce_small`."""
    call = _number_of_call(calls)
    if result.dtype == tl.float32:
        word, count = result.to(tl.int32, bitcast=True), N
        lane, span = tl.arange(0, WIDTH), SPAN
    else:  # two to a word
        bits = result.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        low, high = tl.split(tl.reshape(bits, [M, WIDTH // 2, 2]))
        word, count = low | (high << 16), N // 2
        lane, span = tl.arange(0, WIDTH // 2), SPAN // 2
    at = block * span + lane
    start = inbox + (call & 1) * (RANKS * size) + rank * size
    there = real[:, None] & ((lane < span) & (at < count))[None, :]
    _send_words(regions, start, word, line[:, None] * count + at[None, :], there, rank, RANKS)


@triton.jit
def _receive(line, size, word, there, RANKS: tl.constexpr, RANKS_P: tl.constexpr):
    """int32 [RANKS_P, ...], the words of all ranks, `size` bytes apart, from pointer `line` on, once all are there;
    zeros where none are. Leaves zeros."""
    rank = tl.arange(0, RANKS_P)
    place = line + rank[:, None] * (size // 4) + word[None, :]
    wanted = (rank < RANKS)[:, None] & there[None, :]
    got = tl.load(place, mask=wanted, other=-1, volatile=True)
    while tl.min(tl.min((got != 0).to(tl.int32), 0), 0) == 0:
        got = tl.load(place, mask=wanted, other=-1, volatile=True)
    tl.store(place, tl.zeros_like(got), mask=wanted)
    return ~got


@triton.jit
def _receive_numbered(start, number, word, there):
    """int32, what the words at address `start` carry, once all of them are of call `number`."""
    line = tl.multiple_of(start.to(tl.pointer_type(tl.int64)), 16) + word
    got = tl.load(line, mask=there, other=number, volatile=True)
    while tl.min(((got & 0xFFFFFFFF) == number).to(tl.int32), 0) == 0:
        got = tl.load(line, mask=there, other=number, volatile=True)
    return (got >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["rank"])
def _all_reduce_small(
    x, words, residual, weight, output, regions, calls, rank, first, size, eps, N: tl.constexpr, NP: tl.constexpr,
    RANKS: tl.constexpr, RANKS_P: tl.constexpr, PAIRS: tl.constexpr, SENT: tl.constexpr,
    BESIDE: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row. words: x as int32; PAIRS: of two bf16 each, else of one fp32. first: where in a region the words
    begin; size: bytes of those from one rank. SENT: by the kernel before this one; BESIDE: which lets this one begin
    only when all before it have ended."""
    SPAN: tl.constexpr = NP // 2 if PAIRS else NP
    COUNT: tl.constexpr = N // 2 if PAIRS else N
    row = tl.program_id(0)
    column, word = tl.arange(0, NP), tl.arange(0, SPAN)
    inside, there = column < N, word < COUNT
    at = row * N + column
    gain = 1.0
    if NORM:
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        if not BESIDE:
            gdc_wait()
    call = _number_of_call(calls)
    start = first + (call & 1) * (RANKS * size) + row * (COUNT * 4)
    if not SENT:
        mine = tl.load(words + row * COUNT + word, mask=there, other=0)
        _send_words(regions, start + rank * size, mine, word, there, rank, RANKS)
    old = 0.0
    if ADD:  # not by way of the first-level cache, which may know it from before what is not waited for
        old = tl.load(residual + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    line = tl.multiple_of((tl.load(regions + rank) + start).to(tl.pointer_type(tl.int32)), 16)
    if BESIDE:  # for long, so it is this rank's first word alone that is looked at
        while tl.load(line + rank * (size // 4), volatile=True) == 0:
            pass
    value = _receive(line, size, word, there, RANKS, RANKS_P)
    _count_call(calls)
    if PAIRS:
        even = tl.sum((value << 16).to(tl.float32, bitcast=True), 0)
        odd = tl.sum((value & -65536).to(tl.float32, bitcast=True), 0)
        total = tl.interleave(even, odd)
    else:
        total = tl.sum(value.to(tl.float32, bitcast=True), 0)
    _finish(total.to(x.dtype.element_ty), old, residual, output, gain, at, inside, eps, N, ADD, NORM)
    if PDL and BESIDE:  # for those behind this one
        gdc_wait()


@triton.jit(do_not_specialize=["rank"])
def _all_gather(
    words, output, regions, calls, rank, first, size, count, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program BLOCK words of each rank. output: [RANKS, count] int32; first, size: as in `_all_reduce_small`, of
    words with numbers."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = word < count
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    call = _number_of_call(calls)
    number = call & 0xFFFFFFFF
    mine = tl.load(words + word, mask=there, other=0)
    start = first + (call & 1) * (RANKS * size)
    _send(regions, start + rank * size, (mine.to(tl.int64) << 32) | number, word, there, rank, RANKS)
    for other in tl.static_range(RANKS):
        inbox = tl.load(regions + rank) + start + other * size
        tl.store(output + other * count + word, _receive_numbered(inbox, number, word, there), mask=there)
    _count_call(calls)


def all_reduce(
    x: Tensor,
    regions: Tensor,
    calls: Tensor,
    layout: Layout,
    rank: int,
    *,
    pdl: bool,
    two_shot: bool = False,
    sent: bool = False,
    beside: bool = False,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """x, [T, N] of any float: the sum over the ranks, in place. All ranks call it with the same shapes, in order.

    sent: the kernel that would have made x has sent it instead, for an `Outbox` that takes it. beside: it lets the next
    kernel begin once it has waited itself, not sooner.

    residual: [T, N], to which the sum is added instead, in place; x is then spent. weight: [N], with residual: x
    becomes residual / rms(residual) * weight. regions: [ranks] int64, the addresses of all ranks' regions as this one
    sees them; calls: [1] int64, zero at first, as are all regions. x takes at most a half of `layout`.
    """
    rows, columns = x.shape
    assert x.is_contiguous()
    assert x.nbytes <= layout.half
    assert columns * x.element_size() % 16 == 0
    assert columns <= MAX_COLUMNS
    assert weight is None or residual is not None
    options = {"launch_pdl": True} if pdl else {}
    warps = 4 if columns <= 4096 else 8
    rest = x if residual is None else residual, x if weight is None else weight
    parts = {"ADD": residual is not None, "NORM": weight is not None, "PDL": pdl, "N": columns}
    assert not sent or layout.sends(x.numel(), x.dtype)
    if layout.sends(x.numel(), x.dtype):
        _all_reduce_small[(rows,)](
            x, x.view(torch.int32), *rest, x, regions, calls, rank, layout.words, layout.small, eps, **parts,
            NP=triton.next_power_of_2(columns), RANKS=len(regions),
            RANKS_P=triton.next_power_of_2(len(regions)), PAIRS=x.dtype == torch.bfloat16, SENT=sent, BESIDE=beside,
            num_warps=warps, **options,
        )  # fmt: skip
        return
    _all_reduce[(min(rows, MAX_PROGRAMS),)](
        x, *rest, x, regions, calls, rank, rows, layout.half, FLAGS_BYTES, eps, **parts,
        NP=triton.next_power_of_2(columns), RANKS=len(regions), RANKS_P=triton.next_power_of_2(len(regions)),
        MAX_PROGRAMS=MAX_PROGRAMS, TWO_SHOT=two_shot, ASM=x.is_cuda, num_warps=warps, **options,
    )  # fmt: skip


def all_gather(
    x: Tensor, output: Tensor, regions: Tensor, calls: Tensor, layout: Layout, rank: int, *, pdl: bool
) -> None:
    """output, [ranks, ...]: x of each rank. Its bytes are a multiple of 4, and `layout.small` at most; else as
    `all_reduce`, whose calls these are among."""
    assert x.is_contiguous()
    assert x.nbytes <= layout.small
    options = {"launch_pdl": True} if pdl else {}
    words = x.view(-1).view(torch.int32)
    _all_gather[(triton.cdiv(len(words), GATHER_BLOCK),)](
        words, output.view(-1).view(torch.int32), regions, calls, rank, layout.numbered, 2 * layout.small, len(words),
        RANKS=len(regions), BLOCK=GATHER_BLOCK, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
