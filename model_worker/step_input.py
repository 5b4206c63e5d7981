"""One step's rows on the device: buffers of fixed addresses, and how they are filled.

Either the host makes every number and sends them; or, for steps of decode rows alone on devices that can, it sends
slots and lengths and the device makes the rest.

Legend: R rows of a step, T tokens of all rows, Q places that are sampled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.device_batch import ChunkBucket, DeviceBatch, IntArray
from vibe_sgl_lite.qwen3.layers.linear import TokenAttributes

LongArray = npt.NDArray[np.int64]

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

    A step with drafts that the device makes itself (drafting.py) has rooms [R], how many each row may have. All of its
    rows have as many places then; accept: from what was sampled at them, int32 [Q], to the same, how many drafts each
    row had, and how many of its tokens count. The host's positions are the most that they may be.
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
    rooms: IntArray | None = None
    accept: Callable[[Tensor], Tensor] | None = None

    def planned(self, row: int) -> int:
        """Tokens that the row yields if all of its drafts hold."""
        return 1 + (len(self.drafts.get(row, ())) if self.rooms is None else int(self.rooms[row]))

    @property
    def rows_with_drafts(self) -> list[int]:
        """Those whose yield is not known before the result."""
        return [*self.drafts] if self.rooms is None else np.flatnonzero(self.rooms).tolist()

    @property
    def drafts_by_place(self) -> dict[int, list[int]]:
        """`drafts` by their row's first place."""
        return {self.entries(row).start: tokens for row, tokens in self.drafts.items()}

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


class StepBuffers:
    """Of one rank, for one step at a time. tokens: [slots, length] int32 on the device; page_table: [slots, pages] and
    adapters: [slots], int32 on the host: the slots' state, which is read and never written. The last slot is that of
    padding rows."""

    def __init__(
        self,
        tokens: Tensor,
        page_table: IntArray,
        adapters: IntArray,
        page_size: int,
        padding_page: int,
        device: Device,
        *,
        max_rows: int,
        max_places: int,
        max_tokens: int,
        expand_rows: ExpandRows | None,
    ) -> None:
        """expand_rows: makes steps of decode rows alone on the device, if it can."""
        self.tokens = tokens
        self.page_table = page_table
        self.adapters = adapters
        self.page_size = page_size
        self.padding_page = padding_page
        self.padding_slot = len(page_table) - 1
        self.device = device
        self._rows = Fields(device, max_rows + 1, slots=np.int64, query_start=np.int32, context_lengths=np.int32)
        self._sampled = Fields(
            device, max_places, last_tokens=np.int64, positions=np.int64, places=np.int64, slots=np.int64
        )
        self._tokens = Fields(device, max_tokens, places=np.int64, positions=np.int32, slot_mapping=np.int64)
        self._token_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device.torch_device)
        if not device.synchronous:  # the device's own page table, to which changes are sent; and the rows of a step
            self._changed: list[LongArray] = []
            self.device_pages = torch.from_numpy(page_table.copy()).to(device.torch_device)
            self.row_pages = self.device_pages.new_full((max_rows, page_table.shape[1]), padding_page)
            self._counting = torch.arange(max_rows + 1, device=device.torch_device)
            self._starts = self._counting.to(torch.int32)
        self._expand_rows = None if device.synchronous else expand_rows
        self._host_starts = np.arange(max_rows + 1, dtype=np.int32)
        self._host_rows = np.arange(max_rows)
        self._decodes: dict[int, _DecodeViews] = {}
        self._lengths: IntArray | None = None  # on the device, for the slots that were sent last; None: not known

    def note_pages(self, slots: npt.NDArray[np.integer], index: npt.NDArray[np.integer]) -> None:
        """These entries of the page table have changed."""
        if not self.device.synchronous:
            self._changed.append(slots.astype(np.int64) * self.page_table.shape[1] + index)

    def lengthened(self, step: StepInput) -> None:
        """The device has made the rows of this step, the last one that was filled, one longer: if the next step has the
        same rows, there is nothing to send."""
        lengths = step.batch.host_context_lengths
        self._lengths = lengths + (lengths > 0)

    def fill(
        self,
        slots: IntArray,
        starts: IntArray,
        ends: IntArray,
        sampling_rows: LongArray,
        back: LongArray,
        padding: int,
        max_context: int | None = None,
        bucket: ChunkBucket | None = None,
    ) -> StepInput:
        """The step that runs positions starts .. ends of each of its slots, [R] each; then so many padding rows.

        sampling_rows: [Q], see `StepInput`; back: [Q], how far before its row's last token each place is. max_context:
        the longest one for the device to expect, if it is not that of the rows. bucket: what a step with chunks is to
        be filled up to, with rows without tokens, tokens of no row and places that sample for nobody.
        """
        longest = int(ends.max(initial=1)) if max_context is None else max_context
        expand = self._expand_rows
        alone = bucket is None and len(sampling_rows) == len(slots)
        if expand is not None and alone and (ends - starts == 1).all():
            return self._fill_decodes(expand, slots, ends, padding, longest)
        rows, counts, width = len(slots), ends - starts, self.tokens.shape[1]
        real = int(counts.sum())
        padded_rows, num_tokens, sampled = rows + padding, real + padding, len(sampling_rows) + padding
        if bucket is not None:
            num_tokens, padded_rows = bucket
            sampled = padded_rows
        self._lengths = None
        host = self._rows.host
        query_start, lengths = host["query_start"][: padded_rows + 1], host["context_lengths"][:padded_rows]
        np.cumsum(counts, out=query_start[1 : rows + 1])
        lengths[:rows] = ends
        query_start[rows + 1 :] = real if bucket is not None else np.arange(real + 1, num_tokens + 1)
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
        if num_tokens > real:
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
        if sampled > own:
            host["last_tokens"][own:sampled] = 0 if bucket is not None else np.arange(real, num_tokens)
            host["positions"][own:sampled] = 1
            host["places"][own:sampled] = self.padding_slot * width + 1
            host["slots"][own:sampled] = self.padding_slot
        self._sampled.send(sampled)

        token_ids, on_device = self._token_ids[:num_tokens], self._tokens.device
        torch.index_select(self.tokens.view(-1), 0, on_device["places"][:num_tokens], out=token_ids)
        chunks = np.flatnonzero(counts != 1)
        batch = DeviceBatch(
            token_ids=token_ids,
            positions=on_device["positions"][:num_tokens],
            slot_mapping=on_device["slot_mapping"][:num_tokens],
            query_start=self._rows.device["query_start"][: padded_rows + 1],
            context_lengths=self._rows.device["context_lengths"][:padded_rows],
            page_table=self._page_rows(padded_rows, longest),
            num_decode_rows=int(chunks[0]) if len(chunks) else 0 if bucket is not None else padded_rows,
            host_query_start=query_start,
            host_context_lengths=lengths,
            max_context=longest,
            fills_bucket=bucket is not None,
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

    def _fill_decodes(
        self, expand_rows: ExpandRows, slots: IntArray, ends: IntArray, padding: int, longest: int
    ) -> StepInput:
        """As `fill` for rows of one token that all sample, with most of the work left to the device."""
        rows, padded = len(slots), len(slots) + padding
        host, lengths = self._rows.host, np.zeros(padded, dtype=np.int32)
        lengths[:rows] = ends
        known, self._lengths = self._lengths, None
        if known is None or not np.array_equal(known, lengths) or not np.array_equal(host["slots"][:rows], slots):
            host["slots"][:rows] = slots
            host["slots"][rows:padded] = self.padding_slot
            host["context_lengths"][:padded] = lengths
            self._rows.send(padded)
        self.send_pages()
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
                fills_bucket=False,
                width=1,
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
            "page_table": self.row_pages[:padded],
        }
        step = {
            "last_tokens": self._counting[:padded],
            "positions": self._sampled.device["positions"][:padded],
            "places": self._sampled.device["places"][:padded],
            "device_slots": slots,
        }
        made = (batch["token_ids"], batch["positions"], batch["slot_mapping"], batch["page_table"])
        arguments = (slots, lengths, self.tokens, self.device_pages, *made, step["positions"], step["places"])
        return _DecodeViews(batch, step, lambda: expand_rows(*arguments, self.page_size, self.padding_page))

    def _page_rows(self, padded_rows: int, longest: int) -> Tensor:
        """[R, pages], the page tables of the rows."""
        if self.device.synchronous:
            slots = self._rows.host["slots"][:padded_rows]
            return torch.from_numpy(self.page_table[slots, : -(-longest // self.page_size)])
        self.send_pages()
        rows = self.row_pages[:padded_rows]
        return torch.index_select(self.device_pages, 0, self._rows.device["slots"][:padded_rows], out=rows)

    def send_pages(self) -> None:
        """Bring what has changed in the page table to the device, where that is not the host's."""
        if self._changed:
            changed = np.concatenate(self._changed)
            self._changed.clear()
            # Values as they are now: an entry that changed twice comes twice, with the same value.
            values = self.device.tensor(self.page_table.reshape(-1)[changed])
            self.device_pages.view(-1)[self.device.tensor(changed)] = values
