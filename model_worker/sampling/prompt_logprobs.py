"""Log-probabilities of prompts' own tokens, for the requests that ask for them, chunk by chunk as prompts are computed.

The final hidden state at a position scores the token behind it. The head runs over a bounded number of positions at a
time, since a prompt's logits over the whole vocabulary would take gigabytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.logprobs import Logprobs
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.model_worker.step_input import StepInput
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

# At most this many positions a head call: 39 MB of bf16 logits with Qwen3's vocabulary, and the weights read once.
HEAD_ROWS = 128


@dataclass(frozen=True)
class PromptScores:
    """Of one row of the step: of the prompt tokens at positions first, first + 1, ..., part after part."""

    row: int
    first: int
    parts: list[Logprobs]


@dataclass(frozen=True)
class _Asked:
    num_prompt_tokens: int
    top: int


class PromptLogprobs:
    """Which slots still owe prompt logprobs, and their computation.

    logits: final hidden states [n, H] -> [n, vocab / ranks], float32 or bfloat16. tokens: int32 [max_slots, context
    length], of the slots; read only.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], sampler: Sampler, tokens: Tensor) -> None:
        self._logits = logits
        self._sampler = sampler
        self._tokens = tokens
        self._slots: dict[int, _Asked] = {}

    def admit(self, slot: int, sampling: ResolvedSampling, num_prompt_tokens: int) -> None:
        """Forget what the slot held; remember it if the request wants its prompt scored."""
        self.release(slot)
        if sampling.prompt_logprobs:
            self._slots[slot] = _Asked(num_prompt_tokens, sampling.top_logprobs)

    def release(self, slot: int) -> None:
        """The slot is free; releasing a free one is no error."""
        self._slots.pop(slot, None)

    def of_step(self, hidden: Tensor, step: StepInput) -> list[PromptScores]:
        """hidden: [T, H] final hidden states. All ranks call it with the same step. Reads nothing back."""
        scores: list[PromptScores] = []
        if not self._slots:
            return scores
        starts, ends = step.batch.host_query_start.tolist(), step.batch.host_context_lengths.tolist()
        for row, slot in enumerate(step.slots.tolist()):
            asked = self._slots.get(slot)
            if asked is None:
                continue
            end = ends[row]
            first = end - (starts[row + 1] - starts[row])  # positions first .. last - 1 score first + 1 .. last
            last = min(end, asked.num_prompt_tokens - 1)
            if first < last:
                rows = hidden[starts[row] : starts[row] + last - first]
                scores.append(PromptScores(row, first + 1, self._score(rows, slot, first + 1, asked.top)))
            if end >= asked.num_prompt_tokens - 1:
                self.release(slot)
        return scores

    def _score(self, hidden: Tensor, slot: int, first: int, top: int) -> list[Logprobs]:
        token_ids = self._tokens[slot, first : first + len(hidden)].to(torch.int64)
        return [
            self._sampler.logprobs_of(self._logits(hidden[begin : begin + HEAD_ROWS]), ids, top)
            for begin, ids in zip(range(0, len(hidden), HEAD_ROWS), torch.split(token_ids, HEAD_ROWS), strict=True)
        ]
