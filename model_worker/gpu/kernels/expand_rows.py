"""From slot and length of each decode row, everything else that a step wants to know of its rows."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _expand_rows(
    slots, lengths, tokens, slot_pages, token_ids, positions, slot_mapping, row_pages, sampled_positions, places,
    width, pages, row_stride, padding_page,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row. A row of length 0 is padding."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    length = tl.load(lengths + row)
    position = tl.maximum(length - 1, 0)
    table = slot_pages + slot * pages
    page = tl.load(table + position // PAGE)
    page = tl.where(length == 0, padding_page, page)
    tl.store(token_ids + row, tl.load(tokens + slot * width + position))
    tl.store(positions + row, position)
    tl.store(slot_mapping + row, page.to(tl.int64) * PAGE + position % PAGE)
    tl.store(sampled_positions + row, (position + 1).to(tl.int64))
    tl.store(places + row, slot * width + position + 1)
    for first in range(0, tl.cdiv(length, PAGE), BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < tl.cdiv(length, PAGE)
        tl.store(row_pages + row.to(tl.int64) * row_stride + index, tl.load(table + index, mask=inside), mask=inside)


def expand_rows(
    slots: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    slot_pages: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    row_pages: Tensor,
    sampled_positions: Tensor,
    places: Tensor,
    page_size: int,
    padding_page: int,
) -> None:
    """Of R rows of one token each, slots [R] int64 and lengths [R] int32, that token included, 0 for padding, fill:

    token_ids, positions [R] int32; slot_mapping [R] int64, where its key and value go; row_pages [R, pages], the pages
    of its context, from slot_pages [slots, pages]; sampled_positions, places [R] int64, the position after it, and
    where in tokens, [slots, width], that is.
    """
    _expand_rows[(len(lengths),)](
        slots, lengths, tokens, slot_pages, token_ids, positions, slot_mapping, row_pages, sampled_positions, places,
        tokens.shape[1], slot_pages.shape[1], row_pages.stride(0), padding_page,
        PAGE=page_size, BLOCK=128, num_warps=1,
    )  # fmt: skip
