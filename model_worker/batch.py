"""What a rank keeps of every slot between steps, and how a `ForwardBatch` becomes one step's packed tensors.

The scheduler sends only what changed. Lengths and page tables live on the host, where the scheduler's numbers arrive;
tokens live on the model's device, where the sampler makes new ones, so that a step can be prepared before the tokens of
the step before it have reached the host.

Legend: S slots, R rows of a step, T tokens of all rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.attention.metadata import AttentionMetadata
from vibe_sgl_lite.runtime.messages import ForwardBatch

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepInput:
    """One step as the model and the sampler need it.

    token_ids: [T] int32; positions: [T] int32; last_tokens: [Q] int64, where in T the Q sampling rows end. All on the
    model's device. On the host: slots [R] int32; sampling_rows [Q] int64, indices into R; sampling_slots [Q] int64;
    sampling_positions [Q] int64, the position that the sampled token will take.
    """

    token_ids: Tensor
    positions: Tensor
    last_tokens: Tensor
    metadata: AttentionMetadata
    slots: IntArray
    sampling_rows: LongArray
    sampling_slots: LongArray
    sampling_positions: LongArray


class SlotStates:
    """Tokens, lengths and page table of every slot of one rank."""

    def __init__(
        self, max_slots: int, context_length: int, page_size: int, padding_page: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.padding_page = padding_page
        self.device = device
        # Allocated lazily by the system: most slots never get near the context length. One place is spare, for the
        # token of a step that ran on before the scheduler learned that the request had ended.
        self.tokens = torch.empty((max_slots, context_length + 1), dtype=torch.int32, device=device)
        self.num_tokens = np.zeros(max_slots, dtype=np.int32)  # known ones, those not yet computed included
        self.num_computed = np.zeros(max_slots, dtype=np.int32)
        self.page_table = np.full((max_slots, -(-context_length // page_size) + 1), padding_page, dtype=np.int32)
        self.highest_page = -1  # that any row was given so far
        self._row_slots = np.zeros(0, dtype=np.int32)
        self._row_tokens = np.zeros(0, dtype=np.int32)

    def apply(self, batch: ForwardBatch) -> None:
        """Take over everything that `batch` changes, in the order that the message promises."""
        released = unpack(batch.released)
        self.num_tokens[released] = 0
        self.num_computed[released] = 0
        for new in batch.new:
            ids, pages = unpack(new.token_ids), unpack(new.pages)
            assert 0 <= new.num_computed < len(ids)
            self.tokens[new.slot, : len(ids)] = torch.from_numpy(ids.copy())
            self.num_tokens[new.slot] = len(ids)
            self.num_computed[new.slot] = new.num_computed
            self.page_table[new.slot, : len(pages)] = pages
            self.page_table[new.slot, len(pages) :] = self.padding_page
            self.highest_page = max(self.highest_page, int(pages.max(initial=-1)))
        if batch.page_slots:
            pages = unpack(batch.page_ids)
            self.page_table[unpack(batch.page_slots), unpack(batch.page_index)] = pages
            self.highest_page = max(self.highest_page, int(pages.max()))
        if batch.row_slots is not None and batch.row_tokens is not None:
            self._row_slots = unpack(batch.row_slots)
            self._row_tokens = unpack(batch.row_tokens)

    def prepare(self) -> StepInput:
        """The packed tensors of the step's rows; their slots then count as computed, and sampling ones as one longer.

        The caller puts the sampled tokens in place with `append`.
        """
        slots, counts = self._row_slots, self._row_tokens
        starts = self.num_computed[slots]
        ends = starts + counts
        assert (counts > 0).all()
        assert (ends <= self.num_tokens[slots]).all(), "a row runs tokens that are not known"

        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1], dtype=np.int32) - np.repeat(query_start[:-1] - starts, counts)
        token_slots = np.repeat(slots, counts).astype(np.int64)
        pages = self.page_table[token_slots, positions // self.page_size].astype(np.int64)
        cache_slots = pages * self.page_size + positions % self.page_size
        width = -(-int(ends.max(initial=1)) // self.page_size)

        sampling_rows = np.flatnonzero(ends == self.num_tokens[slots])
        step = StepInput(
            token_ids=self.tokens.view(-1)[self._device(token_slots * self.tokens.shape[1] + positions)],
            positions=self._device(positions),
            last_tokens=self._device(query_start[1:][sampling_rows].astype(np.int64) - 1),
            metadata=AttentionMetadata(
                query_start=self._device(query_start),
                context_lengths=self._device(ends),
                page_table=self._device(np.ascontiguousarray(self.page_table[slots, :width])),
                cache_slots=self._device(cache_slots),
                host_query_start=query_start,
                host_context_lengths=ends,
            ),
            slots=slots,
            sampling_rows=sampling_rows,
            sampling_slots=slots[sampling_rows].astype(np.int64),
            sampling_positions=ends[sampling_rows].astype(np.int64),
        )
        self.num_computed[slots] = ends
        self.num_tokens[step.sampling_slots] += 1
        return step

    def append(self, step: StepInput, token_ids: Tensor) -> None:
        """Put the sampled tokens, [Q] on the device, behind the tokens of their slots."""
        if len(step.sampling_slots) == 0:
            return
        places = step.sampling_slots * self.tokens.shape[1] + step.sampling_positions
        self.tokens.view(-1)[self._device(places)] = token_ids.to(torch.int32)

    def _device(self, array: IntArray | LongArray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def unpack(data: bytes) -> IntArray:
    """int32 bytes as a read-only array, without a copy."""
    return np.frombuffer(data, dtype=np.int32)
