"""Speculative decoding on the device: drafts by prompt lookup, the rows that check them, and how many hold.

How long a row is only the device knows: `lengths` of all slots. So the host launches step after step and learns behind
them what each one yielded. See `model_worker/drafting.py`.

Legend: R rows of a step, S slots, N = 1 + the most drafts of a row.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

LONGEST_MATCH = tl.constexpr(16)  # tokens that are compared, as model_worker/ngram.py does
BLOCK = 1024  # places that are looked at together


@triton.jit
def _look_up(
    slots, known, rooms, lengths, tokens, row_lengths, drafted, width, BLOCK: tl.constexpr, DRAFTS: tl.constexpr
):
    """A program a row. DRAFTS: a power of two, the most drafts or more."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    told = tl.load(known + row)
    length = tl.where(told < 0, tl.load(lengths + slot), told)
    tl.store(row_lengths + row, length)
    line = tokens + slot * width
    end = length - 1
    room = tl.load(rooms + row)
    best = tl.full([], -1, tl.int64)  # tokens that agree, then the place: the longest, and of equals the latest
    if (room > 0) & (length > 2):
        last = tl.load(line + end)
        before = tl.load(line + end - 1)
        for first in range(0, end, BLOCK):
            place = first + tl.arange(0, BLOCK)
            same = (place >= 1) & (place < end)
            same &= tl.load(line + place, mask=same, other=-1) == last
            same &= tl.load(line + place - 1, mask=same, other=-1) == before
            if tl.max(same.to(tl.int32), 0) > 0:
                count = tl.where(same, 2, 0)
                for back in range(2, LONGEST_MATCH):
                    same &= place >= back
                    wanted = tl.load(line + tl.maximum(end - back, 0))
                    same &= tl.load(line + place - back, mask=same, other=-1) == wanted
                    count += same.to(tl.int32)
                found = tl.where(count > 0, (count.to(tl.int64) << 32) + place, -1)
                best = tl.maximum(best, tl.max(found, 0))
    count = tl.where(best >= 0, room, 0)
    tl.store(drafted + row, count)
    place = (best & 0xFFFFFFFF).to(tl.int32)
    draft = tl.arange(0, DRAFTS)
    period = tl.maximum(end - place, 1)  # what reaches the end of what is known begins again
    here = draft < count
    token = tl.load(line + place + 1 + draft % period, mask=here, other=0)
    tl.store(line + length + draft, token, mask=here)


def look_up(
    slots: Tensor, known: Tensor, rooms: Tensor, lengths: Tensor, tokens: Tensor, row_lengths: Tensor, drafted: Tensor,
    most: int,
) -> None:  # fmt: skip
    """Put each row's drafts behind its slot's tokens: what followed where its last tokens came before.

    slots [R] int64. known [R] int32: tokens of the row, negative where `lengths` [S] int32 says it. rooms [R] int32:
    drafts at most, `most` of any. tokens [S, width] int32. Fills row_lengths [R] int32, known or not, and drafted [R]
    int32, how many drafts there are: as many as there is room for, or none.
    """
    _look_up[(len(slots),)](
        slots, known, rooms, lengths, tokens, row_lengths, drafted, tokens.shape[1], BLOCK=BLOCK,
        DRAFTS=triton.next_power_of_2(most), num_warps=4,
    )  # fmt: skip


@triton.jit
def _expand_drafts(
    slots, row_lengths, drafted, tokens, slot_pages, token_ids, positions, slot_mapping, row_pages, context_lengths,
    sampled_positions, places, token_slots, width, pages, row_stride, padding_page, padding_slot,
    N: tl.constexpr, NP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row of N tokens."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    length = tl.load(row_lengths + row)
    count = tl.where(length > 0, 1 + tl.load(drafted + row), 0)
    total = tl.where(length > 0, length - 1 + count, 0)
    tl.store(context_lengths + row, total)
    table = slot_pages + slot * pages
    index = tl.arange(0, NP)
    real = index < count
    inside = index < N
    spot = row * N + index
    position = tl.where(real, length - 1 + index, 0)
    token = tl.load(tokens + slot * width + position, mask=real, other=0)
    page = tl.load(table + position // PAGE, mask=real, other=0)
    page = tl.where(real, page, padding_page)
    tl.store(token_ids + spot, token, mask=inside)
    tl.store(positions + spot, position, mask=inside)
    tl.store(slot_mapping + spot, page.to(tl.int64) * PAGE + position % PAGE, mask=inside)
    tl.store(sampled_positions + spot, (position + 1).to(tl.int64), mask=inside)
    own = tl.where(real, slot, padding_slot)
    tl.store(places + spot, own * width + position + 1, mask=inside)
    tl.store(token_slots + spot, own, mask=inside)
    for first in range(0, tl.cdiv(total, PAGE), BLOCK):
        part = first + tl.arange(0, BLOCK)
        used = part < tl.cdiv(total, PAGE)
        tl.store(row_pages + row.to(tl.int64) * row_stride + part, tl.load(table + part, mask=used), mask=used)


def expand_drafts(
    slots: Tensor, row_lengths: Tensor, drafted: Tensor, tokens: Tensor, slot_pages: Tensor, token_ids: Tensor,
    positions: Tensor, slot_mapping: Tensor, row_pages: Tensor, context_lengths: Tensor, sampled_positions: Tensor,
    places: Tensor, token_slots: Tensor, page_size: int, padding_page: int,
) -> None:  # fmt: skip
    """As `expand_rows`, of rows that all have N tokens: the last one of row_lengths, and its drafts behind it.

    token_ids, positions [R x N] int32; slot_mapping, sampled_positions, places, token_slots [R x N] int64;
    context_lengths [R] int32. What a row has not is position 0 in the padding page, and is drawn for the last slot, as
    all of a row of length 0 is.
    """
    rows = len(slots)
    count = len(token_ids) // rows
    _expand_drafts[(rows,)](
        slots, row_lengths, drafted, tokens, slot_pages, token_ids, positions, slot_mapping, row_pages, context_lengths,
        sampled_positions, places, token_slots, tokens.shape[1], slot_pages.shape[1], row_pages.stride(0), padding_page,
        len(tokens) - 1, N=count, NP=triton.next_power_of_2(count), PAGE=page_size, BLOCK=128, num_warps=1,
    )  # fmt: skip


@triton.jit
def _accept(sampled, token_ids, slots, row_lengths, drafted, lengths, result, rows, N: tl.constexpr, NP: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0)
    index = tl.arange(0, NP)
    inside = index < N
    drawn = tl.load(sampled + row * N + index, mask=inside, other=-1)
    tl.store(result + row * N + index, drawn, mask=inside)
    length = tl.load(row_lengths + row)
    count = tl.load(drafted + row)
    draft = tl.load(token_ids + row * N + index + 1, mask=index + 1 < N, other=-2)
    holds = (draft == drawn) & (index < count)
    kept = tl.min(tl.where(holds, NP, index), 0)  # before the first one that does not hold
    yielded = tl.where(length > 0, 1 + kept, 0)
    tl.store(result + rows * N + row, count)
    tl.store(result + rows * (N + 1) + row, yielded)
    tl.store(lengths + tl.load(slots + row), length + yielded)


def accept(
    sampled: Tensor, token_ids: Tensor, slots: Tensor, row_lengths: Tensor, drafted: Tensor, lengths: Tensor,
    result: Tensor,
) -> None:  # fmt: skip
    """How many of each row's sampled tokens count: up to the first that is not the draft in its place.

    sampled, token_ids: [R x N] int32. lengths [S] becomes that of the row's slot. result: [R x (N + 2)] int32: the
    sampled tokens, then how many drafts each row had, then how many of its tokens count.
    """
    rows = len(slots)
    count = len(token_ids) // rows
    assert sampled.dtype == result.dtype == torch.int32
    assert result.is_contiguous()
    _accept[(rows,)](
        sampled, token_ids, slots, row_lengths, drafted, lengths, result, rows, N=count,
        NP=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip


class LookUp:
    """`DraftKernels` (model_worker/drafting.py) whose drafts are looked up."""

    def bind(self, buffers: object, max_rows: int) -> None:
        pass

    def forget(self, slots: object, lengths: object) -> None:
        pass

    def catch_up(self, slots: object, lengths: object, known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.ones(known.shape, dtype=np.bool_)

    propose = staticmethod(look_up)
    expand = staticmethod(expand_drafts)
    accept = staticmethod(accept)
