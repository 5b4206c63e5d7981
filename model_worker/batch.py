"""What a rank keeps of every slot between steps, and how a `ForwardBatch` becomes one step's `DeviceBatch`.

The scheduler sends only what changed. Lengths and page tables live on the host, where the scheduler's numbers arrive;
tokens live on the model's device, where the sampler makes new ones, so that a step can be prepared before the tokens of
the step before it have reached the host.

Legend: S slots, R rows of a step, T tokens of all rows, Q rows that sample.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device
from vibe_sgl_lite.model_worker.device_batch import ChunkBucket, DeviceBatch, IntArray
from vibe_sgl_lite.model_worker.drafting import DraftBucket, DraftKernels, DraftSteps
from vibe_sgl_lite.model_worker.step_input import ExpandRows, StepBuffers, StepInput
from vibe_sgl_lite.runtime.messages import ForwardBatch


class DraftRow(NamedTuple):
    """A row that may have drafts, `most` of them. tokens: int32, all that are known of its slot: they only become more
    until its release. Not to be kept or changed."""

    slot: int
    tokens: IntArray
    most: int


class Drafter(Protocol):
    """Guesses tokens ahead, for a step to compute with the one that is known and to keep as far as they come true.

    most: of a row.
    """

    most: int

    def propose(self, rows: Sequence[DraftRow]) -> Sequence[Sequence[int]]:
        """For each row at most `most` tokens to follow its `tokens`."""
        ...

    def release(self, slot: int) -> None:
        """The slot is free, or somebody else's; releasing a free one is no error."""
        ...


class SlotStates:
    """Tokens, lengths and page table of every slot of one rank. There is one slot more than the scheduler knows of, for
    padding rows."""

    def __init__(
        self,
        max_slots: int,
        context_length: int,
        page_size: int,
        padding_page: int,
        device: Device,
        *,
        max_tokens: int | None = None,
        row_buckets: Sequence[int] = (),
        chunk_buckets: Sequence[ChunkBucket] = (),
        max_drafts: int = 0,
        expand_rows: ExpandRows | None = None,
        draft_kernels: DraftKernels | None = None,
        draft_buckets: Sequence[DraftBucket] = (),
    ) -> None:
        """max_tokens: of a step; by default as many as all slots and a context have. row_buckets,
        chunk_buckets: of `StepGraphs`; draft_buckets: of steps that the device drafts.
        max_drafts: of a row. expand_rows: makes steps of decode rows alone on the device, if it can; draft_kernels:
        and those with drafts."""
        self.page_size = page_size
        self.padding_page = padding_page
        self.device = device
        self.row_buckets = tuple(sorted(row_buckets))
        self.chunk_buckets = tuple(sorted(chunk_buckets))
        self.padding_slot = max_slots
        # Allocated lazily by the system: most slots never get near the context length. One place is spare, for the
        # token of a step that ran on before the scheduler learned that the request had ended.
        self.tokens = torch.empty((max_slots + 1, context_length + 1), dtype=torch.int32, device=device.torch_device)
        self.tokens[self.padding_slot].zero_()
        # The same memory, where that is the host's: each operation of torch costs what looking up a draft does.
        self._host_tokens: IntArray | None = self.tokens.numpy() if device.synchronous else None
        self.num_tokens = np.zeros(max_slots + 1, dtype=np.int32)  # known ones, those not yet computed included
        self.num_computed = np.zeros(max_slots + 1, dtype=np.int32)
        self.adapters = np.zeros(max_slots + 1, dtype=np.int32)
        self._unsettled: dict[int, list[StepInput]] = {}  # slots whose lengths depend on what became of steps' drafts
        pages = -(-context_length // page_size) + 1
        self.page_table = np.full((max_slots + 1, pages), padding_page, dtype=np.int32)
        self.highest_page = -1  # that any row was given so far
        self._row_slots = np.zeros(0, dtype=np.int32)
        self._row_tokens = np.zeros(0, dtype=np.int32)
        self.have_room = False  # whether some rows of this step have more tokens than one

        max_rows = max(max_slots, *self.row_buckets, *(rows for _, rows in self.chunk_buckets), 1)
        max_tokens = max(max_slots + context_length if max_tokens is None else max_tokens, max_rows)
        max_tokens = max(max_tokens, *(tokens for tokens, _ in self.chunk_buckets), 1)
        self._buffers = StepBuffers(
            self.tokens, self.page_table, self.adapters, page_size, padding_page, device,
            max_rows=max_rows, max_places=max_rows * (1 + max_drafts),
            max_tokens=max_tokens,
            expand_rows=expand_rows,
        )  # fmt: skip
        self.largest = (max_tokens, max_rows)  # that any step may be
        self.draft_buckets = tuple(draft_buckets)
        self._drafts = (
            DraftSteps(draft_kernels, self._buffers, max_drafts, draft_buckets)
            if draft_kernels and max_drafts
            else None
        )

    def apply(self, batch: ForwardBatch) -> None:
        """Take over everything that `batch` changes, in the order that the message promises."""
        released = unpack(batch.released)
        self.num_tokens[released] = 0
        self.num_computed[released] = 0
        self.adapters[released] = 0
        for slot in released.tolist() if self._unsettled else ():
            self._unsettled.pop(slot, None)
        for new in batch.new:
            ids, pages = unpack(new.token_ids), unpack(new.pages)
            assert 0 <= new.num_computed < len(ids)
            self.device.copy(torch.from_numpy(ids.copy()), self.tokens[new.slot, : len(ids)])
            # One that is only pooled has, for all its rows, a token more: so none of them samples.
            self.num_tokens[new.slot] = len(ids) + (new.sampling.pooling is not None)
            self.num_computed[new.slot] = new.num_computed
            self.adapters[new.slot] = 0 if new.attributes is None else new.attributes.adapter
            self._unsettled.pop(new.slot, None)
            if self._drafts is not None:
                self._drafts.forget(np.array([new.slot]), np.zeros(1, dtype=np.int32))
            self.page_table[new.slot, : len(pages)] = pages
            self.page_table[new.slot, len(pages) :] = self.padding_page
            self.highest_page = max(self.highest_page, int(pages.max(initial=-1)))
            self._buffers.note_pages(np.full(len(pages), new.slot), np.arange(len(pages)))
        if batch.page_slots:
            slots, index, pages = unpack(batch.page_slots), unpack(batch.page_index), unpack(batch.page_ids)
            self.page_table[slots, index] = pages
            self.highest_page = max(self.highest_page, int(pages.max()))
            self._buffers.note_pages(slots, index)
        if batch.row_slots is not None and batch.row_tokens is not None:
            self._row_slots = unpack(batch.row_slots)
            self._row_tokens = unpack(batch.row_tokens)
            self.have_room = bool((self._row_tokens > 1).any())

    def waits(self, drafter: Drafter | None) -> bool:
        """Whether this step's rows can be prepared only when the steps before it are done and settled."""
        if self._any_unsettled or drafter is None or not self.have_room:
            return self._any_unsettled
        return bool((self._row_tokens > (self.num_tokens - self.num_computed)[self._row_slots]).any())

    @property
    def _any_unsettled(self) -> bool:
        return bool(self._unsettled) and not self._unsettled.keys().isdisjoint(self._row_slots.tolist())

    def draftable(self) -> IntArray | None:
        """The slots of this step's rows, if it is one whose drafts the device can make: all decode, some have room; or
        have none, but the host does not know how long they are."""
        slots = self._row_slots
        if self._drafts is None or not (self.have_room or self._any_unsettled):
            return None
        known = (self.num_tokens - self.num_computed)[slots]
        return slots if (known == 1).all() and not self.adapters[slots].any() else None

    def prepare_drafts(self) -> StepInput:
        """`prepare`, where the device makes the drafts: their slots then count as if all held, until `settle`."""
        assert self._drafts is not None
        slots, rooms = self._row_slots, np.minimum(self._row_tokens - 1, self._drafts.most)
        lengths = self.num_tokens[slots]
        bucket = self._drafts.bucket(len(slots), int(rooms.max()))
        step = self._drafts.fill(slots, lengths, rooms, bucket, int((lengths + rooms).max()))
        self.num_computed[slots] += 1 + rooms
        self.num_tokens[slots] += 1 + rooms
        self._note_unsettled(step)
        return step

    def padding_drafts(self, bucket: DraftBucket, max_context: int) -> StepInput:
        """`padding_step` of such a step."""
        assert self._drafts is not None
        none = np.zeros(0, dtype=np.int32)
        return self._drafts.fill(none, none, none, bucket, max_context)

    def is_draft_bucket(self, batch: DeviceBatch) -> bool:
        return self._drafts is not None and (batch.num_rows, batch.width) in self._drafts.buckets

    def _note_unsettled(self, step: StepInput) -> None:
        for slot in step.slots[step.rows_with_drafts].tolist():
            self._unsettled.setdefault(slot, []).append(step)

    def prepare(self, drafter: Drafter | None = None) -> StepInput:
        """The step's rows for the device; their slots then count as computed, and sampling ones as one longer: but for
        those with drafts, which `settle` moves on.

        A row that may have more tokens than its slot knows gets drafts, or else runs fewer. The caller puts the sampled
        tokens in place with `append`.
        """
        slots, starts = self._row_slots, self.num_computed[self._row_slots]
        known = self.num_tokens[slots] - starts
        assert (self._row_tokens > 0).all()
        assert (known > 0).all(), "a row of a slot that has no token to run"
        counts, drafts = np.minimum(self._row_tokens, known), self._draft(drafter, known)
        for row, tokens in drafts.items():
            counts[row] += len(tokens)
        ends = starts + counts
        sampling_rows = np.flatnonzero(counts >= known)
        self.num_computed[slots] = ends
        self.num_tokens[slots[sampling_rows]] += 1
        if self._drafts is not None and self._drafts.knows_some:
            self._drafts.forget(slots, self.num_tokens[slots])
        back = np.zeros(len(sampling_rows), dtype=np.int64)
        if drafts:
            each = np.array([1 + len(drafts.get(row, ())) for row in sampling_rows.tolist()])
            sampling_rows = np.repeat(sampling_rows, each)
            back = np.repeat(np.cumsum(each), each) - 1 - np.arange(len(sampling_rows))
        padding = self._padding(counts, len(sampling_rows))
        bucket = None if drafts or self.adapters[slots].any() else self._chunk_bucket(counts)
        step = self._buffers.fill(slots, starts, ends, sampling_rows, back, padding, bucket=bucket)
        if drafts:
            step = replace(step, drafts=drafts)
            self.num_tokens[slots[[*drafts]]] += [len(tokens) for tokens in drafts.values()]
            self._note_unsettled(step)
        return step

    def settle(self, step: StepInput, row: int, yielded: int) -> None:
        """So many tokens came of a row with drafts; what was computed for the others does not count."""
        slot = int(step.slots[row])
        steps = self._unsettled.get(slot, [])
        if steps and steps[0] is step:
            rejected = step.planned(row) - yielded
            self.num_tokens[slot] -= rejected
            self.num_computed[slot] -= rejected
            steps.pop(0)
            if not steps:
                del self._unsettled[slot]

    def take_back(self, step: StepInput, rows: Sequence[int]) -> None:
        """These rows of `step`, the last one prepared, yield no token; each runs its slot's last token again."""
        slots = step.slots[list(rows)]
        self.num_tokens[slots] -= 1
        self.num_computed[slots] = self.num_tokens[slots] - 1

    def _draft(self, drafter: Drafter | None, known: IntArray) -> dict[int, list[int]]:
        """Drafts for the rows that have room for them, put behind their slots' tokens."""
        if drafter is None or not self.have_room:
            return {}
        drafts: dict[int, list[int]] = {}
        room = (self._row_tokens - known).tolist()
        rows = [row for row, most in enumerate(room) if most > 0]
        if not rows:
            return drafts
        slots = self._row_slots.tolist()
        asked = [DraftRow(slots[row], self._read_tokens(slots[row]), room[row]) for row in rows]
        for row, (slot, tokens, most), proposed in zip(rows, asked, drafter.propose(asked), strict=True):
            if len(proposed):
                drafts[row] = [*proposed][:most]
                self._write_tokens(slot, len(tokens), drafts[row])
        return drafts

    def _read_tokens(self, slot: int) -> IntArray:
        if self._host_tokens is not None:
            return self._host_tokens[slot, : self.num_tokens[slot]]
        return self.tokens[slot, : self.num_tokens[slot]].cpu().numpy()

    def _write_tokens(self, slot: int, first: int, tokens: list[int]) -> None:
        """Put them at these places of a slot."""
        if self._host_tokens is not None:
            self._host_tokens[slot, first : first + len(tokens)] = tokens
        else:
            self.device.copy(torch.tensor(tokens, dtype=torch.int32), self.tokens[slot, first : first + len(tokens)])

    def padding_step(self, rows: int, max_context: int) -> StepInput:
        """A step of padding rows alone, for graphs: as a batch of that many decode rows with such a longest context."""
        none, nobody = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return self._buffers.fill(none, none, none, nobody, nobody, rows, max_context)

    def padding_chunks(self, bucket: ChunkBucket) -> StepInput:
        """The same as a batch with chunks: all of it is what it is filled up with."""
        none, nobody = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return self._buffers.fill(none, none, none, nobody, nobody, 0, bucket=bucket)

    def lengthened(self, step: StepInput) -> None:
        """The device has made the rows of this step, which it expanded, one longer."""
        self._buffers.lengthened(step)

    def append(self, step: StepInput, token_ids: Tensor) -> None:
        """Put the sampled tokens, [Q] on the device, behind the tokens of their slots."""
        self.tokens.view(-1).scatter_(0, step.places[: len(token_ids)], token_ids.to(torch.int32))

    def _chunk_bucket(self, counts: IntArray) -> ChunkBucket | None:
        """The least that holds the step, if it has chunks."""
        if (counts == 1).all():
            return None
        tokens, rows = int(counts.sum()), len(counts)
        return next((bucket for bucket in self.chunk_buckets if bucket[0] >= tokens and bucket[1] >= rows), None)

    def _padding(self, counts: IntArray, num_sampling: int) -> int:
        """How many padding rows bring the step to a size for which there may be a graph."""
        rows = len(counts)
        if rows == 0 or num_sampling < rows or (counts != 1).any():
            return 0
        return next((bucket - rows for bucket in self.row_buckets if bucket >= rows), 0)


def unpack(data: bytes) -> IntArray:
    """int32 bytes as a read-only array, without a copy."""
    return np.frombuffer(data, dtype=np.int32)
