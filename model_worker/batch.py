"""What a rank keeps of every slot between steps, and how a `ForwardBatch` becomes one step's `DeviceBatch`.

The scheduler sends only what changed. Lengths and page tables live on the host, where the scheduler's numbers arrive;
tokens live on the model's device, where the sampler makes new ones, so that a step can be prepared before the tokens of
the step before it have reached the host.

Legend: S slots, R rows of a step, T tokens of all rows, Q rows that sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.runtime.messages import ForwardBatch

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepInput:
    """One step as the runner needs it: the device's part, and which of its rows sample. None of them is padding.

    On the host: slots [R] int32; sampling_rows [Q] int64, indices into R; sampling_slots [Q] int64; sampling_positions
    [Q] int64, the position that the sampled token will take. On the device: last_tokens [Q] int64, where in T they end;
    positions [Q] int64, as on the host; places [Q] int64, where in all slots' tokens the sampled ones go. Where the
    batch is padded for a graph, the device's three go on for its padding rows.
    """

    batch: DeviceBatch
    slots: IntArray
    sampling_rows: LongArray
    sampling_slots: LongArray
    sampling_positions: LongArray
    last_tokens: Tensor
    positions: Tensor
    places: Tensor


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
    ) -> None:
        """max_tokens: of a step; by default as many as all slots and a context have. row_buckets: of `StepGraphs`."""
        self.page_size = page_size
        self.padding_page = padding_page
        self.device = device
        self.row_buckets = tuple(sorted(row_buckets))
        self.padding_slot = max_slots
        # Allocated lazily by the system: most slots never get near the context length. One place is spare, for the
        # token of a step that ran on before the scheduler learned that the request had ended.
        self.tokens = torch.empty((max_slots + 1, context_length + 1), dtype=torch.int32, device=device.torch_device)
        self.tokens[self.padding_slot].zero_()
        self.num_tokens = np.zeros(max_slots + 1, dtype=np.int32)  # known ones, those not yet computed included
        self.num_computed = np.zeros(max_slots + 1, dtype=np.int32)
        pages = -(-context_length // page_size) + 1
        self.page_table = np.full((max_slots + 1, pages), padding_page, dtype=np.int32)
        self.highest_page = -1  # that any row was given so far
        self._row_slots = np.zeros(0, dtype=np.int32)
        self._row_tokens = np.zeros(0, dtype=np.int32)

        max_rows = max(max_slots, *self.row_buckets, 1)
        max_tokens = max(max_slots + context_length if max_tokens is None else max_tokens, max_rows)
        self._rows = Fields(device, max_rows + 1, slots=np.int64, query_start=np.int32, context_lengths=np.int32)
        self._sampled = Fields(device, max_rows, last_tokens=np.int64, positions=np.int64, places=np.int64)
        self._tokens = Fields(device, max_tokens, places=np.int64, positions=np.int32, slot_mapping=np.int64)
        self._token_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device.torch_device)
        if not device.synchronous:  # the device's own page table, to which changes are sent; and the rows of a step
            self._changed: list[LongArray] = []
            self._device_pages = torch.from_numpy(self.page_table.copy()).to(device.torch_device)
            self._row_pages = self._device_pages.new_full((max_rows, pages), padding_page)

    def apply(self, batch: ForwardBatch) -> None:
        """Take over everything that `batch` changes, in the order that the message promises."""
        released = unpack(batch.released)
        self.num_tokens[released] = 0
        self.num_computed[released] = 0
        for new in batch.new:
            ids, pages = unpack(new.token_ids), unpack(new.pages)
            assert 0 <= new.num_computed < len(ids)
            self.tokens[new.slot, : len(ids)] = self.device.tensor(ids.copy())
            self.num_tokens[new.slot] = len(ids)
            self.num_computed[new.slot] = new.num_computed
            self.page_table[new.slot, : len(pages)] = pages
            self.page_table[new.slot, len(pages) :] = self.padding_page
            self.highest_page = max(self.highest_page, int(pages.max(initial=-1)))
            self._note_pages(np.full(len(pages), new.slot), np.arange(len(pages)))
        if batch.page_slots:
            slots, index, pages = unpack(batch.page_slots), unpack(batch.page_index), unpack(batch.page_ids)
            self.page_table[slots, index] = pages
            self.highest_page = max(self.highest_page, int(pages.max()))
            self._note_pages(slots, index)
        if batch.row_slots is not None and batch.row_tokens is not None:
            self._row_slots = unpack(batch.row_slots)
            self._row_tokens = unpack(batch.row_tokens)

    def prepare(self) -> StepInput:
        """The step's rows for the device; their slots then count as computed, and sampling ones as one longer.

        The caller puts the sampled tokens in place with `append`.
        """
        slots, counts = self._row_slots, self._row_tokens
        starts = self.num_computed[slots]
        ends = starts + counts
        assert (counts > 0).all()
        assert (ends <= self.num_tokens[slots]).all(), "a row runs tokens that are not known"
        sampling_rows = np.flatnonzero(ends == self.num_tokens[slots])
        self.num_computed[slots] = ends
        sampling_slots = slots[sampling_rows].astype(np.int64)
        self.num_tokens[sampling_slots] += 1
        padding = self._padding(counts, len(sampling_rows))
        return self._fill(slots, starts, ends, sampling_rows, sampling_slots, padding)

    def padding_step(self, rows: int, max_context: int) -> StepInput:
        """A step of padding rows alone, for graphs: as a batch of that many decode rows with such a longest context."""
        none, nobody = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return self._fill(none, none, none, nobody, nobody, rows, max_context)

    def append(self, step: StepInput, token_ids: Tensor) -> None:
        """Put the sampled tokens, [Q] on the device, behind the tokens of their slots."""
        self.tokens.view(-1)[step.places[: len(token_ids)]] = token_ids.to(torch.int32)

    def _padding(self, counts: IntArray, num_sampling: int) -> int:
        """How many padding rows bring the step to a size for which there may be a graph."""
        rows = len(counts)
        if rows == 0 or num_sampling < rows or (counts != 1).any():
            return 0
        return next((bucket - rows for bucket in self.row_buckets if bucket >= rows), 0)

    def _fill(
        self,
        slots: IntArray,
        starts: IntArray,
        ends: IntArray,
        sampling_rows: LongArray,
        sampling_slots: LongArray,
        padding: int,
        max_context: int | None = None,
    ) -> StepInput:
        rows, counts, width = len(slots), ends - starts, self.tokens.shape[1]
        real = int(counts.sum())
        padded_rows, num_tokens, sampled = rows + padding, real + padding, len(sampling_rows) + padding
        host = self._rows.host
        query_start, lengths = host["query_start"][: padded_rows + 1], host["context_lengths"][:padded_rows]
        np.cumsum(counts, out=query_start[1 : rows + 1])
        lengths[:rows] = ends
        if padding:
            query_start[rows + 1 :] = np.arange(real + 1, num_tokens + 1)
            lengths[rows:] = 0
        host["slots"][:rows] = slots
        host["slots"][rows:padded_rows] = self.padding_slot
        self._rows.send(padded_rows + 1)

        host = self._tokens.host
        positions = host["positions"][:num_tokens]
        token_slots = np.repeat(slots, counts).astype(np.int64)
        positions[:real] = np.arange(real, dtype=np.int32) - np.repeat(query_start[:rows] - starts, counts)
        pages = self.page_table[token_slots, positions[:real] // self.page_size].astype(np.int64)
        host["slot_mapping"][:real] = pages * self.page_size + positions[:real] % self.page_size
        host["places"][:real] = token_slots * width + positions[:real]
        if padding:
            positions[real:] = 0
            host["slot_mapping"][real:num_tokens] = self.padding_page * self.page_size
            host["places"][real:num_tokens] = self.padding_slot * width
        self._tokens.send(num_tokens)

        host, sampling_positions = self._sampled.host, ends[sampling_rows].astype(np.int64)
        own = len(sampling_rows)
        host["last_tokens"][:own] = query_start[1:][sampling_rows] - 1
        host["positions"][:own] = sampling_positions
        host["places"][:own] = sampling_slots * width + sampling_positions
        if padding:
            host["last_tokens"][own:sampled] = np.arange(real, num_tokens)
            host["positions"][own:sampled] = 1
            host["places"][own:sampled] = self.padding_slot * width + 1
        self._sampled.send(sampled)

        token_ids, on_device = self._token_ids[:num_tokens], self._tokens.device
        torch.index_select(self.tokens.view(-1), 0, on_device["places"][:num_tokens], out=token_ids)
        longest = int(ends.max(initial=1)) if max_context is None else max_context
        chunks = np.flatnonzero(counts != 1)
        batch = DeviceBatch(
            token_ids=token_ids,
            positions=on_device["positions"][:num_tokens],
            slot_mapping=on_device["slot_mapping"][:num_tokens],
            query_start=self._rows.device["query_start"][: padded_rows + 1],
            context_lengths=self._rows.device["context_lengths"][:padded_rows],
            page_table=self._page_rows(padded_rows, longest),
            num_decode_rows=int(chunks[0]) if len(chunks) else padded_rows,
            host_query_start=query_start,
            host_context_lengths=lengths,
            max_context=longest,
        )
        device = self._sampled.device
        return StepInput(
            batch=batch,
            slots=slots,
            sampling_rows=sampling_rows,
            sampling_slots=sampling_slots,
            sampling_positions=sampling_positions,
            last_tokens=device["last_tokens"][:sampled],
            positions=device["positions"][:sampled],
            places=device["places"][:sampled],
        )

    def _note_pages(self, slots: npt.NDArray[np.integer], index: npt.NDArray[np.integer]) -> None:
        """These entries of the page table have changed."""
        if not self.device.synchronous:
            self._changed.append(slots.astype(np.int64) * self.page_table.shape[1] + index)

    def _page_rows(self, padded_rows: int, longest: int) -> Tensor:
        """[R, pages], the page tables of the rows."""
        if self.device.synchronous:
            slots = self._rows.host["slots"][:padded_rows]
            return torch.from_numpy(self.page_table[slots, : -(-longest // self.page_size)])
        if self._changed:
            changed = np.concatenate(self._changed)
            self._changed.clear()
            # Values as they are now: an entry that changed twice comes twice, with the same value.
            values = self.device.tensor(self.page_table.reshape(-1)[changed])
            self._device_pages.view(-1)[self.device.tensor(changed)] = values
        rows = self._row_pages[:padded_rows]
        return torch.index_select(self._device_pages, 0, self._rows.device["slots"][:padded_rows], out=rows)


def unpack(data: bytes) -> IntArray:
    """int32 bytes as a read-only array, without a copy."""
    return np.frombuffer(data, dtype=np.int32)
