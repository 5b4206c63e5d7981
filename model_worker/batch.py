"""What a rank keeps of every slot between steps, and how a `ForwardBatch` becomes one step's `DeviceBatch`.

The scheduler sends only what changed. Lengths and page tables live on the host, where the scheduler's numbers arrive;
tokens live on the model's device, where the sampler makes new ones, so that a step can be prepared before the tokens of
the step before it have reached the host.

Legend: S slots, R rows of a step, T tokens of all rows, Q rows that sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.qwen3.layers.linear import TokenAttributes
from vibe_sgl_lite.runtime.messages import ForwardBatch

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


class Drafter(Protocol):
    """Guesses tokens ahead, for a step to compute with the one that is known and to keep as far as they come true.

    most: of a row.
    """

    most: int

    def propose(self, slot: int, position: int, most: int) -> Sequence[int]:
        """At most `most` tokens of that slot, from `position` on; all before it are known."""
        ...


# What model_worker/gpu/kernels/expand_rows.py does.
ExpandRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], None]


@dataclass(frozen=True)
class StepInput:
    """One step as the runner needs it: the device's part, and which of its rows sample. None of them is padding.

    On the host: slots [R] int32; sampling_rows [Q] int64, indices into R, ascending: a row with k drafts has 1 + k
    places, the others one; sampling_slots [Q] int64; sampling_positions [Q] int64, the position that the sampled token
    will take. drafts: those of the rows that have some, by row.
    On the device: last_tokens [Q] int64, where in T they end; positions and device_slots [Q] int64, as on the host;
    places [Q] int64, where in all slots' tokens the sampled ones go. Where the batch is padded for a graph, these four
    go on for its padding rows. attributes: None where all rows are plain. expand: makes the device's tensors of the
    rows' slots and lengths; it comes before all else, and can be captured.
    """

    batch: DeviceBatch
    slots: IntArray
    sampling_rows: LongArray
    sampling_slots: LongArray
    sampling_positions: LongArray
    last_tokens: Tensor
    positions: Tensor
    places: Tensor
    device_slots: Tensor
    drafts: dict[int, list[int]] = field(default_factory=dict)
    attributes: TokenAttributes | None = None
    expand: Callable[[], None] | None = None

    def entries(self, row: int) -> slice:
        """Where among the Q places a row's are."""
        first, end = np.searchsorted(self.sampling_rows, (row, row + 1)).tolist()
        return slice(first, end)


@dataclass(frozen=True)
class _DecodeViews:
    """The device's tensors of a step of so many decode rows, and what fills them: the same in every such step."""

    batch: dict[str, Tensor]
    step: dict[str, Tensor]
    expand: Callable[[], None]


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
        max_drafts: int = 0,
        expand_rows: ExpandRows | None = None,
    ) -> None:
        """max_tokens: of a step; by default as many as all slots and a context have. row_buckets: of `StepGraphs`.
        max_drafts: of a row. expand_rows: makes steps of decode rows alone on the device, if it can."""
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
        self.adapters = np.zeros(max_slots + 1, dtype=np.int32)
        self._unsettled: dict[int, StepInput] = {}  # slots whose lengths depend on what became of a step's drafts
        pages = -(-context_length // page_size) + 1
        self.page_table = np.full((max_slots + 1, pages), padding_page, dtype=np.int32)
        self.highest_page = -1  # that any row was given so far
        self._row_slots = np.zeros(0, dtype=np.int32)
        self._row_tokens = np.zeros(0, dtype=np.int32)

        max_rows = max(max_slots, *self.row_buckets, 1)
        max_tokens = max(max_slots + context_length if max_tokens is None else max_tokens, max_rows)
        self._rows = Fields(device, max_rows + 1, slots=np.int64, query_start=np.int32, context_lengths=np.int32)
        places = max_rows * (1 + max_drafts)
        self._sampled = Fields(
            device, places, last_tokens=np.int64, positions=np.int64, places=np.int64, slots=np.int64
        )
        self._tokens = Fields(device, max_tokens, places=np.int64, positions=np.int32, slot_mapping=np.int64)
        self._token_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device.torch_device)
        if not device.synchronous:  # the device's own page table, to which changes are sent; and the rows of a step
            self._changed: list[LongArray] = []
            self._device_pages = torch.from_numpy(self.page_table.copy()).to(device.torch_device)
            self._row_pages = self._device_pages.new_full((max_rows, pages), padding_page)
            self._counting = torch.arange(max_rows + 1, device=device.torch_device)
            self._starts = self._counting.to(torch.int32)
        self._expand_rows = None if device.synchronous else expand_rows
        self._host_starts = np.arange(max_rows + 1, dtype=np.int32)
        self._host_rows = np.arange(max_rows)
        self._decodes: dict[int, _DecodeViews] = {}

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
            self.tokens[new.slot, : len(ids)] = self.device.tensor(ids.copy())
            self.num_tokens[new.slot] = len(ids)
            self.num_computed[new.slot] = new.num_computed
            self.adapters[new.slot] = 0 if new.attributes is None else new.attributes.adapter
            self._unsettled.pop(new.slot, None)
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

    def waits(self, drafter: Drafter | None) -> bool:
        """Whether this step's rows can be prepared only when the steps before it are done and settled."""
        slots = self._row_slots
        if self._unsettled and not self._unsettled.keys().isdisjoint(slots.tolist()):
            return True
        return drafter is not None and bool((self._row_tokens > (self.num_tokens - self.num_computed)[slots]).any())

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
        back = np.zeros(len(sampling_rows), dtype=np.int64)
        if drafts:
            each = np.array([1 + len(drafts.get(row, ())) for row in sampling_rows.tolist()])
            sampling_rows = np.repeat(sampling_rows, each)
            back = np.repeat(np.cumsum(each), each) - 1 - np.arange(len(sampling_rows))
        padding = self._padding(counts, len(sampling_rows))
        if self._expand_rows is not None and not drafts and len(sampling_rows) == len(slots) and (counts == 1).all():
            return self._fill_decodes(self._expand_rows, slots, ends, padding, int(ends.max(initial=1)))
        step = self._fill(slots, starts, ends, sampling_rows, back, padding)
        if drafts:
            step = replace(step, drafts=drafts)
            self._unsettled |= dict.fromkeys(slots[[*drafts]].tolist(), step)
        return step

    def settle(self, step: StepInput, row: int, yielded: int) -> None:
        """So many tokens came of a row with drafts; what was computed for the others does not count."""
        slot = int(step.slots[row])
        if self._unsettled.get(slot) is step:
            del self._unsettled[slot]
            self.num_tokens[slot] += yielded - 1
            self.num_computed[slot] = self.num_tokens[slot] - 1

    def _draft(self, drafter: Drafter | None, known: IntArray) -> dict[int, list[int]]:
        """Drafts for the rows that have room for them, put behind their slots' tokens."""
        room = self._row_tokens - known
        if drafter is None or not (room > 0).any():
            return {}
        drafts, places, ids = {}, [], []
        for row in np.flatnonzero(room > 0).tolist():
            slot, most = int(self._row_slots[row]), int(room[row])
            first = int(self.num_tokens[slot])
            tokens = [*drafter.propose(slot, first, most)][:most]
            if tokens:
                drafts[row] = tokens
                places += [slot * self.tokens.shape[1] + first + i for i in range(len(tokens))]
                ids += tokens
        if drafts:
            flat = self.device.tensor(np.array(places, dtype=np.int64))
            self.tokens.view(-1)[flat] = self.device.tensor(np.array(ids, dtype=np.int32))
        return drafts

    def padding_step(self, rows: int, max_context: int) -> StepInput:
        """A step of padding rows alone, for graphs: as a batch of that many decode rows with such a longest context."""
        none, nobody = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        if self._expand_rows is not None:
            return self._fill_decodes(self._expand_rows, none, none, rows, max_context)
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

    def _fill_decodes(
        self, expand_rows: ExpandRows, slots: IntArray, ends: IntArray, padding: int, longest: int
    ) -> StepInput:
        """As `_fill` for rows of one token that all sample, with most of the work left to the device."""
        rows, padded = len(slots), len(slots) + padding
        host, lengths = self._rows.host, np.zeros(padded, dtype=np.int32)
        lengths[:rows] = ends
        host["slots"][:rows] = slots
        host["slots"][rows:padded] = self.padding_slot
        host["context_lengths"][:padded] = lengths
        self._rows.send(padded)
        self._send_pages()
        if padded not in self._decodes:
            self._decodes[padded] = self._decode_views(expand_rows, padded)
        views = self._decodes[padded]
        adapters = self.adapters[slots]
        return StepInput(
            batch=DeviceBatch(
                **views.batch,
                num_decode_rows=padded,
                host_query_start=self._host_starts[: padded + 1],
                host_context_lengths=lengths,
                max_context=longest,
            ),
            slots=slots,
            sampling_rows=self._host_rows[:rows],
            sampling_slots=slots.astype(np.int64),
            sampling_positions=ends.astype(np.int64),
            last_tokens=views.step["last_tokens"],
            positions=views.step["positions"],
            places=views.step["places"],
            device_slots=views.step["device_slots"],
            attributes=TokenAttributes(self.device.tensor(adapters)) if adapters.any() else None,
            expand=views.expand,
        )

    def _decode_views(self, expand_rows: ExpandRows, padded: int) -> "_DecodeViews":
        lengths, slots = self._rows.device["context_lengths"][:padded], self._rows.device["slots"][:padded]
        batch = {
            "token_ids": self._token_ids[:padded],
            "positions": self._tokens.device["positions"][:padded],
            "slot_mapping": self._tokens.device["slot_mapping"][:padded],
            "query_start": self._starts[: padded + 1],
            "context_lengths": lengths,
            "page_table": self._row_pages[:padded],
        }
        step = {
            "last_tokens": self._counting[:padded],
            "positions": self._sampled.device["positions"][:padded],
            "places": self._sampled.device["places"][:padded],
            "device_slots": slots,
        }
        made = (batch["token_ids"], batch["positions"], batch["slot_mapping"], batch["page_table"])
        arguments = (slots, lengths, self.tokens, self._device_pages, *made, step["positions"], step["places"])
        return _DecodeViews(batch, step, lambda: expand_rows(*arguments, self.page_size, self.padding_page))

    def _fill(
        self,
        slots: IntArray,
        starts: IntArray,
        ends: IntArray,
        sampling_rows: LongArray,
        back: LongArray,
        padding: int,
        max_context: int | None = None,
    ) -> StepInput:
        """back: [Q], how far before its row's last token each place is."""
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

        host, own = self._sampled.host, len(sampling_rows)
        sampling_slots, sampling_positions = slots[sampling_rows].astype(np.int64), ends[sampling_rows] - back
        host["last_tokens"][:own] = query_start[1:][sampling_rows] - 1 - back
        host["positions"][:own] = sampling_positions
        host["places"][:own] = sampling_slots * width + sampling_positions
        host["slots"][:own] = sampling_slots
        if padding:
            host["last_tokens"][own:sampled] = np.arange(real, num_tokens)
            host["positions"][own:sampled] = 1
            host["places"][own:sampled] = self.padding_slot * width + 1
            host["slots"][own:sampled] = self.padding_slot
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
        device, adapters = self._sampled.device, self.adapters[token_slots]
        return StepInput(
            batch=batch,
            slots=slots,
            sampling_rows=sampling_rows,
            sampling_slots=sampling_slots,
            sampling_positions=sampling_positions,
            last_tokens=device["last_tokens"][:sampled],
            positions=device["positions"][:sampled],
            places=device["places"][:sampled],
            device_slots=device["slots"][:sampled],
            attributes=TokenAttributes(self.device.tensor(adapters)) if adapters.any() else None,
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
        self._send_pages()
        rows = self._row_pages[:padded_rows]
        return torch.index_select(self._device_pages, 0, self._rows.device["slots"][:padded_rows], out=rows)

    def _send_pages(self) -> None:
        """Bring what has changed in the page table to the device."""
        if self._changed:
            changed = np.concatenate(self._changed)
            self._changed.clear()
            # Values as they are now: an entry that changed twice comes twice, with the same value.
            values = self.device.tensor(self.page_table.reshape(-1)[changed])
            self._device_pages.view(-1)[self.device.tensor(changed)] = values


def unpack(data: bytes) -> IntArray:
    """int32 bytes as a read-only array, without a copy."""
    return np.frombuffer(data, dtype=np.int32)
