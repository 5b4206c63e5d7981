"""Drafts by a smaller model on the device, inside the graph of the step that checks them.

Its keys and values lie in a pool of its own under the page ids of the large one. Of each row it runs the last two known
tokens, of which the step before may have left the first one out, and then its own drafts, one after the other. What it
has not seen of a row before that is run when the row first drafts, or drafts again (model_worker/draft_model.py does
the same on a CPU). Rows without room take part, so that nothing of them is missing later.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.compute import Compute
from vibe_sgl_lite.model_worker.device import Device
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, IntArray
from vibe_sgl_lite.model_worker.draft_model import CATCH_UP
from vibe_sgl_lite.model_worker.gpu.kernels.expand_rows import expand_rows
from vibe_sgl_lite.model_worker.gpu.kernels.speculate import accept, expand_drafts
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.step_input import StepBuffers
from vibe_sgl_lite.qwen3.model import Qwen3


class DraftsByModel:
    """`DraftKernels` (model_worker/drafting.py), for one rank."""

    expand = staticmethod(expand_drafts)
    accept = staticmethod(accept)

    def __init__(self, model: Qwen3, pool: KVPool, compute: Compute, device: Device) -> None:
        """model: with its weights. pool: as many pages as that of the large model, of the same size. compute: for the
        model's shape. device: the large model's."""
        self.pool = pool
        self._model = model
        self._backend = compute.attention(pool)
        compute.plan_layers(model, self._backend)
        self._device = device
        self._buffers: StepBuffers
        self._chunks: StepBuffers
        self._token_ids: Tensor
        self._rows: dict[tuple[int, int], tuple[DeviceBatch, object]] = {}  # and metadata, by rows and width
        self._seen: IntArray  # tokens of a slot whose keys and values are here
        self._wanted: IntArray  # and so many should be

    def bind(self, buffers: StepBuffers, max_rows: int) -> None:
        self._buffers, slots, kind = buffers, len(buffers.page_table), self._device.torch_device
        self._chunks = StepBuffers(
            buffers.tokens, buffers.page_table, buffers.adapters, buffers.page_size, buffers.padding_page, self._device,
            max_rows=slots, max_places=1, max_tokens=CATCH_UP, expand_rows=None,
        )  # fmt: skip
        self._chunks.device_pages = buffers.device_pages
        self._token_ids, self._positions = (torch.zeros(2 * max_rows, dtype=torch.int32, device=kind) for _ in range(2))
        self._contexts = torch.zeros(max_rows, dtype=torch.int32, device=kind)
        self._mapping, self._unused, self._unused_places, self._unused_slots = (
            torch.zeros(2 * max_rows, dtype=torch.int64, device=kind) for _ in range(4)
        )
        self._seen, self._wanted = np.zeros(slots, dtype=np.int32), np.zeros(slots, dtype=np.int32)

    def forget(self, slots: npt.NDArray[np.integer], lengths: IntArray) -> None:
        """These slots go on without drafts, or anew where a length is 0: all but the last three tokens are here."""
        self._seen[slots] = self._wanted[slots] = np.maximum(lengths - 3, 0)

    @torch.inference_mode()
    def catch_up(self, slots: IntArray, lengths: IntArray, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Run what is missing of rows, [R]. lengths: where not `known` to the device. Returns which rows are here."""
        self._wanted[slots] = np.where(known, self._wanted[slots], np.maximum(lengths - 2, 0))
        starts = self._seen[slots]
        missing = np.maximum(self._wanted[slots] - starts, 0)
        counts = np.minimum(missing, np.maximum(CATCH_UP - (np.cumsum(missing) - missing), 0))
        rows = np.flatnonzero(counts)
        if len(rows):
            none = np.zeros(0, dtype=np.int64)
            own, first = slots[rows], starts[rows]
            step = self._chunks.fill(own, first, first + counts[rows], none, none, 0)
            metadata = self._backend.prepare(step.batch)
            self._model.forward(step.batch.token_ids, step.batch.positions, self._backend, metadata)
            self._seen[own] += counts[rows]
        here: npt.NDArray[np.bool_] = counts == missing
        return here

    def propose(
        self, slots: Tensor, known: Tensor, rooms: Tensor, lengths: Tensor, tokens: Tensor, row_lengths: Tensor,
        drafted: Tensor, most: int,
    ) -> None:  # fmt: skip
        row_lengths.copy_(torch.where(known < 0, lengths[slots], known))
        drafted.copy_(torch.where(row_lengths > 0, rooms, 0))
        rows, buffers, width = len(slots), self._buffers, tokens.shape[1]
        for number in range(most):
            batch, metadata = self._batch(rows, 1 if number else 2)
            made = batch.token_ids, batch.positions, batch.slot_mapping, batch.page_table
            contexts, count = batch.context_lengths, len(batch.token_ids)
            unused = self._unused[:count], self._unused_places[:count]
            if number == 0:
                before = torch.clamp(row_lengths - 1, min=0)
                expand_drafts(
                    slots, before, torch.clamp(before, max=1), tokens, buffers.device_pages, *made, contexts,
                    *unused, self._unused_slots[:count], buffers.page_size, buffers.padding_page,
                )  # fmt: skip
            else:
                contexts.copy_(torch.where(drafted > number, row_lengths + number, 0))
                expand_rows(
                    slots, contexts, tokens, buffers.device_pages, *made, *unused, buffers.page_size,
                    buffers.padding_page,
                )  # fmt: skip
            hidden = self._model.forward(batch.token_ids, batch.positions, self._backend, metadata)
            ends = hidden.view(rows, batch.width, -1)[:, -1].contiguous()
            token_ids = self._model.logits(ends).argmax(1).to(torch.int32)
            places = slots * width + row_lengths + number
            places = torch.where(drafted > number, places, buffers.padding_slot * width)
            tokens.view(-1).scatter_(0, places, token_ids)

    def _batch(self, rows: int, width: int) -> tuple[DeviceBatch, object]:
        """What the backend plans for such a step does not depend on the rows' lengths."""
        if (rows, width) not in self._rows:
            batch = DeviceBatch(
                token_ids=self._token_ids[: rows * width],
                positions=self._positions[: rows * width],
                slot_mapping=self._mapping[: rows * width],
                query_start=torch.arange(rows + 1, device=self._device.torch_device, dtype=torch.int32) * width,
                context_lengths=self._contexts[:rows],
                page_table=self._buffers.row_pages[:rows],
                num_decode_rows=rows,
                host_query_start=np.arange(rows + 1, dtype=np.int32) * width,
                host_context_lengths=np.zeros(rows, dtype=np.int32),
                max_context=1,
                width=width,
            )
            self._rows[rows, width] = batch, self._backend.prepare(batch)
        return self._rows[rows, width]
