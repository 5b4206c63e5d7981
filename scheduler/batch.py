"""Turns a planned step into a `ForwardBatch`: only what the ranks do not know yet.

Changes may gather while no step is sent (slots released, pages replaced by a shared duplicate); they go with the next.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec

from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot
from vibe_sgl_lite.scheduler.cost import Work
from vibe_sgl_lite.scheduler.request import Request


class Chunk(msgspec.Struct, frozen=True):
    """A prefill row: `count` tokens of `request`, up to `end`. It samples when `end` is the last known token."""

    request: Request
    count: int
    end: int
    samples: bool


class Step(msgspec.Struct):
    """A step in flight. Row order: `decode`, then `chunks`.

    tokens: of each decode row, drafts included; None: one each. estimate_s: what it should take; 0 when nothing was
        measured yet.
    """

    number: int
    decode: list[Request]
    chunks: list[Chunk]
    sent_at: float
    work: Work
    estimate_s: float
    tokens: array[int] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.decode) + len(self.chunks)


class BatchBuilder:
    """Remembers what was told to the ranks of one epoch; `build` says the rest."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._released: list[int] = []
        self._new: dict[int, Request] = {}
        self._page_slots: list[int] = []
        self._page_index: list[int] = []
        self._page_ids: list[int] = []
        self._replaced: list[tuple[Request, int, int]] = []
        self._last_slots = b""
        self._last_tokens = b""

    def release_slot(self, request: Request) -> None:
        """The slot is free again; page changes it was still to learn are moot."""
        self._released.append(request.slot)
        if self._replaced:
            self._replaced = [change for change in self._replaced if change[0] is not request]

    def take_slot(self, request: Request) -> None:
        """A request begins in its slot; its page table is read when the batch is built."""
        self._new[request.uid] = request

    def is_new(self, request: Request) -> bool:
        """The ranks do not know the slot's page table yet, and will get all of it."""
        return request.uid in self._new

    def add_pages(self, request: Request, first: int, pages: Sequence[int]) -> None:
        """`pages` now follow the first `first` pages of a running request's table."""
        self._page_slots += [request.slot] * len(pages)
        self._page_index += range(first, first + len(pages))
        self._page_ids += pages

    def add_page_each(self, requests: Sequence[Request], pages: Sequence[int]) -> None:
        """The last page of each request's table is new."""
        self._page_slots += [r.slot for r in requests]
        self._page_index += [len(r.pages) - 1 for r in requests]
        self._page_ids += pages

    def replace_pages(self, request: Request, changes: Sequence[tuple[int, int]]) -> None:
        """(index, page) in a running request's table that the ranks must learn before its next row."""
        self._replaced += [(request, index, page) for index, page in changes]

    def build(self, step: Step) -> ForwardBatch:
        slots = array("i", [r.slot for r in step.decode])
        tokens = array("i", [1]) * len(step.decode) if step.tokens is None else step.tokens[:]
        for chunk in step.chunks:
            slots.append(chunk.request.slot)
            tokens.append(chunk.count)
        row_slots, row_tokens = slots.tobytes(), tokens.tobytes()
        same = row_slots == self._last_slots and row_tokens == self._last_tokens
        self._last_slots, self._last_tokens = row_slots, row_tokens

        for request, index, page in self._replaced:
            self._page_slots.append(request.slot)
            self._page_index.append(index)
            self._page_ids.append(page)
        chunks = {chunk.request.uid: chunk for chunk in step.chunks} if self._new else {}
        batch = ForwardBatch(
            step=step.number,
            released=array("i", self._released).tobytes(),
            new=[self._new_slot(r, chunks[r.uid]) for r in self._new.values()],
            page_slots=array("i", self._page_slots).tobytes(),
            page_index=array("i", self._page_index).tobytes(),
            page_ids=array("i", self._page_ids).tobytes(),
            row_slots=None if same else row_slots,
            row_tokens=None if same else row_tokens,
            epoch=self._epoch,
        )
        self._released, self._new, self._replaced = [], {}, []
        self._page_slots, self._page_index, self._page_ids = [], [], []
        return batch

    @staticmethod
    def _new_slot(request: Request, chunk: Chunk) -> NewSlot:
        return NewSlot(
            slot=request.slot,
            uid=request.uid,
            token_ids=bytes(request.tokens),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed=chunk.end - chunk.count,
            pages=request.pages.tobytes(),
            sampling=request.sampling,
            sample_index=request.index,
            attributes=request.attributes,
        )
