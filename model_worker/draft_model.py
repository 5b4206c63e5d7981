"""Drafts by a smaller model of the same vocabulary: greedy, one forward a draft of all rows, on a CPU.

Its keys and values lie in a pool of its own under the page ids of the large one. It runs when a row has room, and then
first what it has not seen of that row: the prompt, also where the large model found it in the prefix cache, and what
came meanwhile. Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023; here a
draft holds if it is the token that the large model draws.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.batch import DraftRow, SlotStates
from vibe_sgl_lite.model_worker.compute import Compute
from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.model_worker.device_batch import IntArray
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.step_input import StepBuffers
from vibe_sgl_lite.qwen3.model import Qwen3

CATCH_UP = 1024  # tokens that are run at once, of all rows: one that misses more has no drafts meanwhile


class DraftModel:
    """A `vibe_sgl_lite.model_worker.batch.Drafter`. most: drafts of a row. Every rank has its part of it, and proposes
    the same."""

    def __init__(self, model: Qwen3, pool: KVPool, compute: Compute, most: int) -> None:
        """model: with its weights. pool: as many pages as that of the large model, of the same size."""
        self.most = most
        self.pool = pool
        self._model = model
        self._backend = compute.attention(pool)
        compute.plan_layers(model, self._backend)
        self._greedy: Callable[[Tensor], Tensor]
        self._slots: SlotStates
        self._buffers: StepBuffers
        self._computed: dict[int, int] = {}  # tokens of a slot whose keys and values are here
        self._drafts: dict[int, tuple[int, list[int]]] = {}  # the last ones of a slot, and where they began
        self._pages: dict[int, IntArray] = {}  # where they were put

    def bind(self, slots: SlotStates, greedy: Callable[[Tensor], Tensor]) -> None:
        """slots: of the large model. greedy: from logits of all ranks to the highest one's token."""
        self._slots, self._greedy = slots, greedy
        self._buffers = StepBuffers(
            slots.tokens, slots.page_table, slots.adapters, slots.page_size, slots.padding_page, CpuDevice(),
            max_rows=len(slots.page_table), max_places=1, max_tokens=CATCH_UP + len(slots.page_table), expand_rows=None,
        )  # fmt: skip

    def propose(self, rows: Sequence[DraftRow]) -> Sequence[Sequence[int]]:
        self.pool.will_use(self._slots.highest_page)
        drafts: list[list[int]] = [[] for _ in rows]
        spans, drafting, left = [], list[int](), CATCH_UP
        for number, (slot, tokens, _) in enumerate(rows):
            known, start = len(tokens), self._known_here(slot, tokens)
            end = min(known, start + max(left, 1 if known - start == 1 else 0))
            left -= end - start
            if end > start:
                spans.append((slot, start, end))
                self._note(slot, end)
            if end == known:
                drafting.append(number)
        ends = iter(self._run(spans))
        firsts = {slot: token for (slot, _, _), token in zip(spans, ends, strict=True)}
        for number in drafting:
            drafts[number].append(firsts[rows[number].slot])
        while more := [number for number in drafting if len(drafts[number]) < rows[number].most]:
            spans = []
            for number in more:
                slot, place = rows[number].slot, len(rows[number].tokens) + len(drafts[number]) - 1
                self._slots.tokens[slot, place] = drafts[number][-1]
                spans.append((slot, place, place + 1))
            for number, token in zip(more, self._run(spans), strict=True):
                drafts[number].append(token)
        for number in drafting:
            self._drafts[rows[number].slot] = len(rows[number].tokens), drafts[number]
        return drafts

    def release(self, slot: int) -> None:
        for state in (self._computed, self._drafts, self._pages):
            state.pop(slot, None)

    def _known_here(self, slot: int, tokens: IntArray) -> int:
        """How many tokens need not be run: all but the last one at most."""
        start = self._computed.get(slot, 0)
        if slot in self._drafts:  # the last of them was never run
            _, drafts = self._drafts.pop(slot)
            came = tokens[start : start + len(drafts) - 1]
            start += int((np.array(drafts[: len(came)]) == came).cumprod().sum())
        pages = self._pages.get(slot, self._slots.page_table[slot, :0])
        moved = np.flatnonzero(pages != self._slots.page_table[slot, : len(pages)])
        if len(moved):  # a page was replaced by another request's with the same tokens
            start = min(start, int(moved[0]) * self._slots.page_size)
        return min(start, len(tokens) - 1)

    def _note(self, slot: int, computed: int) -> None:
        self._computed[slot] = computed
        self._pages[slot] = self._slots.page_table[slot, : -(-computed // self._slots.page_size)].copy()

    @torch.inference_mode()
    def _run(self, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        """The tokens that are most likely behind positions start .. end of slots, one row each: (slot, start, end)."""
        if not spans:
            return []
        slots, starts, ends = np.array(spans, dtype=np.int32).T
        none = np.zeros(0, dtype=np.int64)
        step = self._buffers.fill(slots, starts, ends, none, none, 0)
        metadata = self._backend.prepare(step.batch)
        hidden = self._model.forward(step.batch.token_ids, step.batch.positions, self._backend, metadata)
        logits = self._model.logits(hidden[torch.from_numpy(np.cumsum(ends - starts) - 1)])
        tokens: list[int] = self._greedy(logits.float() if logits.dtype == torch.float16 else logits).tolist()
        return tokens
