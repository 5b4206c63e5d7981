"""Runs steps on one rank: the slots' state, the model over its KV pool, the head and the sampler.

A step has two halves. `launch` hands it to the device and reads nothing back; `collect` waits for the little that comes
back. The next step may be launched before the last one is collected: what it needs of it stays on the device. On a CPU
`launch` does all the work.

Knows nothing of sockets; `model_worker/worker.py` feeds it. Every rank runs the same batches and ends each step with
the same tokens.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.batch import Drafter, SlotStates, unpack
from vibe_sgl_lite.model_worker.compute import Compute
from vibe_sgl_lite.model_worker.device_batch import Result
from vibe_sgl_lite.model_worker.draft_model import DraftModel
from vibe_sgl_lite.model_worker.drafting import draft_buckets
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.pending_step import PendingStep
from vibe_sgl_lite.model_worker.pooling import Pooler
from vibe_sgl_lite.model_worker.sampling.constraints import Constraints
from vibe_sgl_lite.model_worker.sampling.grammar import GrammarLibrary
from vibe_sgl_lite.model_worker.sampling.prompt_logprobs import PromptLogprobs
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.model_worker.step_input import StepInput
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER, PartTimer
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, StepResult, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve

WARM_UP_TOKENS = 32
CPU_WARM_UP_TOKENS = 8  # there every token takes time


@dataclass(frozen=True)
class ForwardOutput:
    """hidden: [T, H]. logits: [Q, vocab / ranks], None when no row samples. bad_rows [R], bad_logits [Q]: bool, rows
    with NaN or inf in them; None where it is known that there are none. token_ids: int32 [Q], where they are drawn
    already, and then -1 where they cannot be."""

    hidden: Tensor
    logits: Tensor | None
    bad_rows: Tensor | None = None
    bad_logits: Tensor | None = None
    token_ids: Tensor | None = None


class ModelRunner:
    """One rank's model at work. Called with every step of the pipeline, in order."""

    def __init__(
        self,
        model: Qwen3,
        pool: KVPool,
        compute: Compute,
        *,
        max_slots: int,
        context_length: int,
        max_tokens: int | None = None,
        tokenizer_file: Path | None = None,
        timer: PartTimer = NO_TIMER,
        drafter: Drafter | None = None,
        device_drafts: int = 0,
    ) -> None:
        """max_tokens: of a step; see `SlotStates`. tokenizer_file: tokenizer.json, for grammars; without it no request
        may have one. timer: told where every part of a step begins. drafter: guesses tokens for rows that have room for
        them. device_drafts: the most that the device guesses for a row itself, by prompt lookup, if it can.
        """
        self.model = model
        self.pool = pool
        self.backend = compute.attention(pool)
        self.compute_name = compute.name.split(",")[0]
        self.device = compute.device
        self.graphs = graphs = compute.graphs
        self.timer = timer
        self.drafter = drafter
        self.slots = SlotStates(
            max_slots,
            context_length,
            pool.page_size,
            pool.padding_page,
            self.device,
            max_tokens=max_tokens,
            row_buckets=() if graphs is None else graphs.row_buckets,
            chunk_buckets=() if graphs is None else graphs.chunk_buckets,
            max_drafts=device_drafts if drafter is None else drafter.most,
            expand_rows=compute.expand_rows,
            draft_kernels=compute.draft_kernels,
            draft_buckets=()
            if graphs is None or not device_drafts
            else draft_buckets(graphs.row_buckets, device_drafts),
        )
        argmax = None if compute.kernels is None else compute.kernels.argmax
        self.sampler = Sampler(
            model.config.vocab_size, model.parallel.tp, self.slots.tokens, argmax, self.device, compute.fused_draw
        )
        if isinstance(drafter, DraftModel):
            drafter.bind(self.slots, self.sampler.draw_greedily)
        library = None
        if tokenizer_file is not None:
            library = GrammarLibrary(tokenizer_file, model.config.vocab_size, model.config.eos_token_ids)
        self.constraints = Constraints(model.config.vocab_size, self.sampler.vocab, library, self.device)
        self.prompt_logprobs = PromptLogprobs(self._logits, self.sampler, self.slots.tokens)
        self.pooler = Pooler(self._logits, self.sampler, self.device)
        self._in_flight: deque[PendingStep] = deque()
        self._last_done = 0.0

    def run(self, batch: ForwardBatch) -> StepResult:
        """Both halves."""
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: ForwardBatch) -> PendingStep:
        """Apply what changed, run the rows, sample those that are at their end.

        Waits for the steps before only where rows' constraints have to know their tokens, and then with the forward
        already under way; or where rows may have drafts, unless the device makes them and draws all rows in one go.
        """
        started = time.perf_counter()
        self.timer.mark("apply")
        self.apply(batch)
        self.timer.mark("prepare")
        on_device, ahead = self._drafts_on_device()
        if self._in_flight and not ahead and self.slots.waits(self.drafter):
            self._land_until(self._in_flight[-1])
        step = self.slots.prepare_drafts() if on_device else self.slots.prepare(self.drafter)
        pending = PendingStep(batch.step, batch.epoch, step, started)
        if len(step.slots) == 0:
            pending.total_s = time.perf_counter() - started
            return pending
        self.timer.mark("sampling")
        pending.constrained = self.constraints.of(step.sampling_slots)
        if not self._in_flight:
            pending.mask = self.constraints.begin(pending.constrained, step.drafts_by_place)
        output = self._forward(step, fused=self._fuses(pending))
        pending.forward_s = time.perf_counter() - started
        self.timer.mark("sampling")
        pending.prompts = self.prompt_logprobs.of_step(output.hidden, step)
        pending.pooled = self.pooler.of_step(output.hidden, step)
        if pending.constrained and self._in_flight:
            self._land_until(self._in_flight[-1])
            pending.mask = self.constraints.begin(pending.constrained, step.drafts_by_place)
        if pending.mask is not None:
            alone = len({*step.sampling_rows[pending.mask.rows].tolist()}) == len(step.slots)
            pending.mask.settle(self.model.parallel.tp, pending.forward_s, alone=alone)
            self.slots.take_back(step, pending.late)
        pending.read_back = self.device.read_back(self._sample(pending, output))
        self._in_flight.append(pending)
        if self.device.synchronous:
            self._land_until(pending)
        self.timer.mark(OTHER)
        return pending

    def collect(self, pending: PendingStep) -> StepResult:
        """Tell what came of each row. Waits until the step is done. Steps are collected in the order of launch."""
        if pending.read_back is not None:
            self._land_until(pending)
        return pending.result()

    def warm_up(self) -> None:
        """Run a short prefill, on a GPU in two chunks, and a decode, so that thread pools, scratch memory and kernels
        are ready for requests; then capture what graphs there are to be. On a GPU also the largest step, whose memory
        then stays with torch.

        Before the first step, on all ranks together. Writes only to the padding page and leaves no slot occupied.
        """
        most = CPU_WARM_UP_TOKENS if self.device.synchronous else WARM_UP_TOKENS
        count = min(most, self.slots.tokens.shape[1] - 2, self.slots.largest[0])
        prompt = np.zeros(count, dtype=np.int32).tobytes()
        sampling = resolve(
            SamplingParams(max_new_tokens=1, temperature=0.0, seed=0),
            model_defaults={},
            end_token_ids=(),
            prompt_tokens=count,
            context_length=count + 1,
            vocab_size=self.model.config.vocab_size,
        )
        new = NewSlot(0, 0, prompt, count, 0, pages=b"", sampling=sampling)  # no pages: the padding page takes all
        slot = pack_ids([0])
        # Two chunks: a GPU loads what a chunk needs that is not its prompt's end at its first use, for 0.1 s.
        steps = (count, 1) if self.device.synchronous else (count - 1, 1, 1)
        for number, tokens in enumerate(tokens for tokens in steps if tokens):
            arriving = [] if number else [new]
            self.run(ForwardBatch(number, new=arriving, row_slots=slot, row_tokens=pack_ids([tokens])))
        self.run(ForwardBatch(3, released=slot, row_slots=b"", row_tokens=b""))
        fused = self.sampler.fused is not None
        if not self.device.synchronous and self.slots.largest not in self.slots.chunk_buckets:
            with torch.inference_mode():
                self._forward(self.slots.padding_chunks(self.slots.largest), fused=fused)
        if self.graphs is not None:
            with self.graphs.capturing(), torch.inference_mode():
                for bucket in reversed(self.slots.chunk_buckets):
                    self._forward(self.slots.padding_chunks(bucket), fused=fused)
                for rows in sorted(self.graphs.row_buckets, reverse=True):
                    for context in sorted(self.backend.graph_contexts(), reverse=True):
                        self._forward(self.slots.padding_step(rows, context), fused=fused)
                for bucket in sorted(self.slots.draft_buckets, reverse=True):
                    for context in (max(self.backend.graph_contexts()), 1):  # all keys of these: they are no chain
                        self._forward(self.slots.padding_drafts(bucket, context), fused=fused)

    def apply(self, batch: ForwardBatch) -> None:
        """Take over what the batch changes; the first thing that `launch` does."""
        self.slots.apply(batch)
        self.pool.will_use(self.slots.highest_page)
        for slot in unpack(batch.released).tolist():
            self.sampler.release(slot)
            self.prompt_logprobs.release(slot)
            self.pooler.release(slot)
            self.constraints.release(slot)
            self._forget_drafts(slot)
        for new in batch.new:
            self._forget_drafts(new.slot)
            self.sampler.admit(new.slot, new.sampling, new.num_prompt_tokens)
            self.prompt_logprobs.admit(new.slot, new.sampling, new.num_prompt_tokens)
            self.pooler.admit(new.slot, new.sampling.pooling, new.num_prompt_tokens)
            self.constraints.admit(new.slot, new.sampling, unpack(new.token_ids)[new.num_prompt_tokens :].tolist())

    def idle(self) -> None:
        """Between steps, when none is known to come: prepare for those that may."""
        self.pool.idle()
        if isinstance(self.drafter, DraftModel):
            self.drafter.pool.idle()

    def _forget_drafts(self, slot: int) -> None:
        if self.drafter is not None:
            self.drafter.release(slot)

    def _drafts_on_device(self) -> tuple[bool, bool]:
        """Whether the device makes this step's drafts; and whether the host need not know how long its rows are. A row
        with a constraint has none: its masks would have to know them."""
        slots = self.slots.draftable()
        if slots is None or self.constraints.of(slots.astype(np.int64)):
            return False, False
        ahead = self.sampler.fused is not None and self.sampler.fused.takes(slots)
        return ahead or self.slots.have_room, ahead

    def _fuses(self, pending: PendingStep) -> bool:
        """Whether all rows are such that the fused draw takes."""
        fused = self.sampler.fused
        step = pending.step
        return fused is not None and not pending.constrained and not step.drafts and fused.takes(step.slots)

    def _forward(self, step: StepInput, *, fused: bool) -> ForwardOutput:
        """The model and the head, and the draw if it is fused: as they are, or as graphs of them."""
        batch, draw = step.batch, self.sampler.fused
        metadata = self.backend.prepare(batch)
        key = None
        if self.graphs is not None and step.attributes is None:
            decodes = batch.decodes_only and len(step.places) == batch.num_tokens
            is_bucket = (
                self.slots.is_draft_bucket(batch) if batch.width > 1 else batch.num_rows in self.graphs.row_buckets
            )
            if batch.fills_bucket or (decodes and is_bucket):
                key = self.backend.graph_key(batch)
        if key is not None:
            key = (batch.num_tokens, key) if batch.width == 1 else (batch.num_tokens, batch.width, key)
        output = self._run(key, lambda: self._compute(step, metadata))
        if not fused:
            return self._guard(step, output)
        logits = output.logits
        if len(step.sampling_rows) < len(step.slots):  # logits show it of the others: NaN in a row stays to its end
            output = self._guard(step, replace(output, logits=None))
        if draw is None or logits is None:
            return replace(output, token_ids=self.slots.tokens.new_empty(0))
        where = step.device_slots, step.positions, self.slots.tokens, step.places
        lengths = None if step.expand is None or step.accept is not None else batch.context_lengths

        def drawn() -> Tensor:
            self.timer.mark("sampling")
            token_ids = draw(logits, *where, lengths)
            return token_ids if step.accept is None else step.accept(token_ids)

        token_ids = self._run(key and ("draw", key), drawn)
        if lengths is not None:
            self.slots.lengthened(step)
        return replace(output, token_ids=token_ids)

    def _run(self, key: Hashable | None, work: Callable[[], Result]) -> Result:
        """As a graph, if there is a key for it."""

        def run(work: Callable[[], Result]) -> Result:
            return work() if key is None or self.graphs is None else self.graphs.run(key, work)

        return self.timer.on_device(key, work, run)

    def _compute(self, step: StepInput, metadata: object) -> ForwardOutput:
        batch = step.batch
        if step.expand is not None:
            step.expand()
        hidden = self.model.forward(
            batch.token_ids, batch.positions, self.backend, metadata, self.timer, step.attributes
        )
        self.timer.mark(OTHER)
        if len(step.last_tokens) == 0:
            return ForwardOutput(hidden, None)
        all_end = len(step.last_tokens) == len(hidden) and not batch.fills_bucket
        ends = hidden if all_end else hidden[step.last_tokens]
        self.timer.mark("head")
        logits = self._logits(ends)
        self.timer.mark(OTHER)
        return ForwardOutput(hidden, logits)

    def _guard(self, step: StepInput, output: ForwardOutput) -> ForwardOutput:
        """Find the rows with NaN or inf; their hidden states and logits become 0: other rows share the sampler."""
        hidden, logits = output.hidden, output.logits
        bad, bad_rows = self._bad(hidden), None
        if bad is not None:
            hidden.masked_fill_(bad[:, None], 0)
            lone = step.batch.decodes_only and step.batch.width == 1
            bad_rows = bad if lone else _any_in_row(bad, step.batch.query_start)
        if logits is None:
            return replace(output, bad_rows=bad_rows)
        if bad is not None:
            logits.masked_fill_(bad[step.last_tokens][:, None], 0)
        bad_logits = self._bad(logits)
        group = self.model.parallel.tp
        if group.size > 1:  # each rank has seen a part of the vocabulary
            if bad_logits is None:
                bad_logits = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            bad_logits = group.all_reduce_max(bad_logits.to(torch.int32)).to(torch.bool)
        return replace(output, bad_rows=bad_rows, bad_logits=bad_logits)

    def _sample(self, pending: PendingStep, output: ForwardOutput) -> list[Tensor]:
        """Draw, put the tokens behind their slots', and return what is to be read back; see `PendingStep`."""
        step, parts = pending.step, []
        if output.token_ids is not None:
            parts.append(output.token_ids)
        elif output.logits is not None:
            own = len(step.sampling_rows)
            if own:
                sampled = self.sampler.sample(
                    output.logits[:own], step.sampling_slots, step.sampling_positions, pending.mask,
                    step.positions[:own],
                )  # fmt: skip
                self.slots.append(step, sampled.token_ids)
                pending.logprobs = sampled.logprobs
                parts.append(sampled.token_ids)
            if len(step.places) > own:
                parts.append(self.slots.tokens.new_zeros(len(step.places) - own))
            if step.accept is not None:
                parts = [step.accept(torch.cat([part.to(torch.int32) for part in parts]))]
        if output.bad_rows is not None or output.bad_logits is not None:
            parts.append(_flags(output.bad_rows, step.batch.num_rows, output.hidden))
            parts.append(_flags(output.bad_logits, len(step.places), output.hidden))
        ids = [part.to(torch.int32) for part in parts]
        results = [torch.cat(ids) if len(ids) > 1 else ids[0] if ids else step.batch.token_ids[:0]]
        if pending.logprobs is not None:
            results.append(pending.logprobs.packed())
        results += [part.packed() for prompt in pending.prompts for part in prompt.parts]
        return results + [pooled.values for pooled in pending.pooled]

    def _land_until(self, pending: PendingStep) -> None:
        """Wait for the results of this step and of those before it, and tell them to whom they concern."""
        while pending.results is None:
            step = self._in_flight.popleft()
            assert step.read_back is not None
            step.results = step.read_back.wait()
            now = time.perf_counter()
            step.total_s = now - max(step.started, self._last_done)
            self._last_done = now
            for place, constraint in step.constrained:
                for token in step.tokens[step.step.sampling_rows[place]]:
                    constraint.accept(token)
            for row in step.step.rows_with_drafts:
                self.slots.settle(step.step, row, len(step.tokens[row]))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, vocab / ranks], in a dtype that the sampler reads: float32 or bfloat16."""
        logits = self.model.logits(hidden)
        return logits.float() if logits.dtype == torch.float16 else logits

    def _bad(self, x: Tensor) -> Tensor | None:
        """bool [n], the rows of x [n, m] that have NaN or inf; None if the host knows that there are none."""
        if not self.device.synchronous:
            lowest, highest = torch.aminmax(x, dim=1)  # which let a NaN through
            return torch.isfinite(lowest).logical_and_(torch.isfinite(highest)).logical_not_()
        if math.isfinite(float(torch.linalg.vector_norm(x))):  # one quick read; NaN and inf survive it
            return None
        bad = torch.isfinite(x).all(dim=1).logical_not_()
        return bad if bool(bad.any()) else None  # else only the sum of squares overflowed


def _flags(bad: Tensor | None, count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=like.device) if bad is None else bad


def _any_in_row(tokens: Tensor, query_start: Tensor) -> Tensor:
    """bool [T] -> bool [R]: whether any token of the row is True."""
    before = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    return before[query_start[1:]] > before[query_start[:-1]]
