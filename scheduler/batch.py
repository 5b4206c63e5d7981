"""Turns a planned step into a `ForwardBatch`: only what the ranks do not know yet.

Changes may gather while no step is sent (slots released, pages replaced by a shared duplicate); they go with the next.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import msgspec

from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids
from vibe_sgl_lite.scheduler.cost import Work
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.speculation import DraftPlan


class PrefillChunk(msgspec.Struct, frozen=True):
    """A prefill row: `count` tokens of `request`, up to `end`. It samples when `end` is the last known token."""

    request: Request
    count: int
    end: int
    samples: bool


class DecodeRows:
    """Requests with a decode row each, in order, and their uids and slots as arrays in the same one."""

    __slots__ = ("requests", "slots", "uids")

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.uids = array("q")
        self.slots = array("i")

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.uids.append(request.uid)
        self.slots.append(request.slot)

    def remove(self, request: Request) -> None:
        """Raises ValueError when it is not there."""
        row = self.requests.index(request)
        del self.requests[row], self.uids[row], self.slots[row]

    def clear(self) -> None:
        del self.requests[:], self.uids[:], self.slots[:]

    def copy(self) -> DecodeRows:
        rows = DecodeRows()
        rows.requests, rows.uids, rows.slots = self.requests[:], self.uids[:], self.slots[:]
        return rows

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class Step(msgspec.Struct):
    """A step in flight. Row order: `decode`, then `chunks`.

    tokens: of each decode row, drafts included; None: one each. drafts: why so many. estimate_s: what it should take;
        0 when nothing was measured yet.
    """

    number: int
    decode: DecodeRows
    chunks: list[PrefillChunk]
    sent_at: float
    work: Work
    estimate_s: float
    tokens: array[int] | None = None
    drafts: DraftPlan | None = None

    @property
    def num_rows(self) -> int:
        return len(self.decode) + len(self.chunks)

    def num_tokens(self, drafted: Sequence[int]) -> int:
        """What it ran, with so many drafts a row as the ranks had them."""
        if self.tokens is None:
            return self.work.tokens
        return len(self.decode) + sum(drafted) + sum(chunk.count for chunk in self.chunks)


class BatchBuilder:
    """Remembers what was told to the ranks of one epoch; `build` says the rest."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._released: list[int] = []
        self._new: dict[int, Request] = {}
        # Changes of page tables: whose, where, and which page. Those of the second kind may wait for a step.
        self._added: list[tuple[Request, int, int]] = []
        self._replaced: list[tuple[Request, int, int]] = []
        self._last_rows = b"", b""

    def release_slot(self, request: Request) -> None:
        """The slot is free again; page changes it was still to learn are moot."""
        self._released.append(request.slot)
        self._replaced = [change for change in self._replaced if change[0] is not request]

    def take_slot(self, request: Request) -> None:
        """A request begins in its slot; its page table is read when the batch is built."""
        self._new[request.uid] = request

    def add_pages(self, request: Request, pages: Sequence[int]) -> None:
        """`pages` are now the last of a request's table."""
        if request.uid not in self._new:
            first = len(request.pages) - len(pages)
            self._added += [(request, first + index, page) for index, page in enumerate(pages)]

    def replace_pages(self, request: Request, changes: Sequence[tuple[int, int]]) -> None:
        """(index, page) in a running request's table that the ranks must learn before its next row."""
        self._replaced += [(request, index, page) for index, page in changes]

    def build(self, step: Step) -> ForwardBatch:
        slots = step.decode.slots[:]
        tokens = array("i", [1]) * len(step.decode) if step.tokens is None else step.tokens[:]
        for chunk in step.chunks:
            slots.append(chunk.request.slot)
            tokens.append(chunk.count)
        rows = slots.tobytes(), tokens.tobytes()
        same = rows == self._last_rows
        self._last_rows = rows
        chunks = {chunk.request.uid: chunk for chunk in step.chunks} if self._new else {}
        changes = self._added + self._replaced
        batch = ForwardBatch(
            step=step.number,
            released=pack_ids(self._released),
            new=[self._new_slot(r, chunks[r.uid]) for r in self._new.values()],
            page_slots=pack_ids(request.slot for request, _, _ in changes),
            page_index=pack_ids(index for _, index, _ in changes),
            page_ids=pack_ids(page for _, _, page in changes),
            row_slots=None if same else rows[0],
            row_tokens=None if same else rows[1],
            epoch=self._epoch,
        )
        self._released, self._new, self._added, self._replaced = [], {}, [], []
        return batch

    @staticmethod
    def _new_slot(request: Request, chunk: PrefillChunk) -> NewSlot:
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
