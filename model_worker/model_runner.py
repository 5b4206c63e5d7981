"""Runs steps on one rank: the slots' state, the model over its KV pool, the head and the sampler.

Knows nothing of sockets; `model_worker/worker.py` feeds it. Every rank runs the same batches and ends each step with
the same tokens.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.batch import SlotStates, StepInput, unpack
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.sampling.constraints import Constraints, StepMask
from vibe_sgl_lite.model_worker.sampling.grammar import GrammarLibrary
from vibe_sgl_lite.model_worker.sampling.prompt_logprobs import PromptLogprobs, PromptScores
from vibe_sgl_lite.model_worker.sampling.sampler import ArgmaxFunction, SampleOutput, Sampler
from vibe_sgl_lite.qwen3.attention_backend import AttentionBackend
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import EngineError
from vibe_sgl_lite.runtime.messages import (
    FailedRow,
    ForwardBatch,
    NewSlot,
    RowLogprobs,
    StepResult,
    TokenLogprob,
    pack_ids,
)
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve

WARM_UP_TOKENS = 32


class ModelRunner:
    """One rank's model at work. `run` is called with every step of the pipeline, in order."""

    def __init__(
        self,
        model: Qwen3,
        pool: KVPool,
        backend: AttentionBackend,
        *,
        max_slots: int,
        context_length: int,
        tokenizer_file: Path | None = None,
        argmax: ArgmaxFunction | None = None,
    ) -> None:
        """tokenizer_file: tokenizer.json, for grammars; without it no request may have one. argmax: see `Sampler`."""
        self.model = model
        self.pool = pool
        self.backend = backend
        self.slots = SlotStates(max_slots, context_length, pool.page_size, pool.padding_page, model.device)
        self.sampler = Sampler(model.config.vocab_size, model.parallel.tp, self.slots.tokens, argmax)
        library = None
        if tokenizer_file is not None:
            library = GrammarLibrary(tokenizer_file, model.config.vocab_size, model.config.eos_token_ids)
        self.constraints = Constraints(model.config.vocab_size, self.sampler.vocab, library)
        self.prompt_logprobs = PromptLogprobs(self._logits, self.sampler, self.slots.tokens)

    @torch.inference_mode()
    def run(self, batch: ForwardBatch) -> StepResult:
        """Apply what changed, run the rows, sample those that are at their end, and tell what came of each row."""
        started = time.perf_counter()
        self.apply(batch)
        step = self.slots.prepare()
        if len(step.slots) == 0:
            return StepResult(step=batch.step, token_ids=b"", total_s=time.perf_counter() - started, epoch=batch.epoch)
        mask = self.constraints.begin(step.sampling_slots)
        hidden = self.model.forward(step.token_ids, step.positions, self.backend, step.metadata)
        failed = _failed_rows(hidden, step)
        forward_done = time.perf_counter()
        token_ids = np.full(len(step.slots), -1, dtype=np.int32)
        prompts = self.prompt_logprobs.of_step(hidden, step)
        sampled: dict[int, TokenLogprob] = {}
        stuck: list[FailedRow] = []
        if len(step.sampling_rows):
            output = self._sample(hidden, step, mask)
            token_ids[step.sampling_rows] = output.token_ids.cpu().numpy()
            self.constraints.accept(step.sampling_slots, token_ids[step.sampling_rows].tolist())
            if mask is not None:
                stuck = [FailedRow(row, EngineError.code) for row in step.sampling_rows[mask.failed].tolist()]
            token_ids[failed] = -1
            if output.logprobs is not None:
                sampled = {int(step.sampling_rows[row]): entry for row, entry in output.logprobs.entries()}
        return StepResult(
            step=batch.step,
            token_ids=token_ids.tobytes(),
            failed=[FailedRow(row) for row in failed] + stuck,
            logprobs=_merge(sampled, prompts, failed),
            forward_s=forward_done - started,
            total_s=time.perf_counter() - started,
            epoch=batch.epoch,
        )

    def warm_up(self) -> None:
        """Run a short prefill and a decode, so that thread pools, scratch memory and kernels are ready for requests.

        Before the first `run`, on all ranks together. Writes only to the padding page and leaves no slot occupied.
        """
        count = min(WARM_UP_TOKENS, self.slots.tokens.shape[1] - 2)
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
        self.run(ForwardBatch(0, new=[new], row_slots=slot, row_tokens=pack_ids([count])))
        self.run(ForwardBatch(1, row_slots=slot, row_tokens=pack_ids([1])))
        self.run(ForwardBatch(2, released=slot, row_slots=b"", row_tokens=b""))

    def apply(self, batch: ForwardBatch) -> None:
        """Take over what the batch changes; the first thing that `run` does."""
        self.slots.apply(batch)
        self.pool.will_use(self.slots.highest_page)
        for slot in unpack(batch.released).tolist():
            self.sampler.release(slot)
            self.prompt_logprobs.release(slot)
            self.constraints.release(slot)
        for new in batch.new:
            self.sampler.admit(new.slot, new.sampling, new.num_prompt_tokens)
            self.prompt_logprobs.admit(new.slot, new.sampling, new.num_prompt_tokens)
            self.constraints.admit(new.slot, new.sampling, unpack(new.token_ids)[new.num_prompt_tokens :].tolist())

    def _sample(self, hidden: Tensor, step: StepInput, mask: StepMask | None) -> SampleOutput:
        """Tokens for the rows at their end; they are also put behind their slots' tokens."""
        logits = self._logits(hidden[step.last_tokens])
        sampled = self.sampler.sample(logits, step.sampling_slots, step.sampling_positions, mask)
        self.slots.append(step, sampled.token_ids)
        return sampled

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, vocab / ranks], in a dtype that the sampler reads: float32 or bfloat16."""
        logits = self.model.logits(hidden)
        return logits.float() if logits.dtype == torch.float16 else logits


def _merge(sampled: dict[int, TokenLogprob], prompts: dict[int, PromptScores], failed: list[int]) -> list[RowLogprobs]:
    """What each row that did not fail asked for, by row."""
    return [
        RowLogprobs(row, (sampled[row],) if row in sampled else (), prompts[row].first, prompts[row].entries)
        if row in prompts
        else RowLogprobs(row, (sampled[row],))
        for row in sorted({*sampled, *prompts} - {*failed})
    ]


def _failed_rows(hidden: Tensor, step: StepInput) -> list[int]:
    """Rows with NaN or inf in any of their tokens' final hidden states, [T, H]; their hidden states are zeroed.

    A NaN must not reach the sampler, which other rows share, nor the token that is embedded next.
    """
    if math.isfinite(float(hidden.sum(dtype=torch.float32))):  # NaN and inf survive a sum
        return []
    finite = torch.isfinite(hidden).all(dim=-1)  # [T]
    if bool(finite.all()):
        return []  # only the sum overflowed
    bad_tokens = np.flatnonzero(~finite.cpu().numpy())
    rows = np.searchsorted(step.metadata.host_query_start, bad_tokens, side="right") - 1
    hidden.masked_fill_(~finite.unsqueeze(-1), 0)
    return sorted({int(row) for row in rows})
