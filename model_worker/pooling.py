"""Embeddings and scores: what the last hidden state of a prompt gives, for requests that want it in place of tokens.

An embedding is the beginning of the hidden state behind the final norm, as a vector of length 1. A score is how likely
each of a few tokens is to come next, against the others of them: with "yes" and "no", what Qwen3-Reranker's card calls
relevance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device
from vibe_sgl_lite.model_worker.sampling.prompt_logprobs import HEAD_ROWS
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.model_worker.step_input import StepInput
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling


@dataclass(frozen=True)
class PooledRows:
    """Of n rows of a step. values: float32 [n, m] on the device; row i has the first sizes[i] of them."""

    rows: list[int]
    sizes: list[int]
    values: Tensor


class Pooler:
    """Which slots want their prompts pooled, and the computation.

    logits: final hidden states [n, H] -> [n, vocab / ranks], float32 or bfloat16.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], sampler: Sampler, device: Device) -> None:
        self._logits = logits
        self._sampler = sampler
        self._device = device
        self._slots: dict[int, tuple[Pooling, int]] = {}  # with the number of the prompt's tokens

    def admit(self, slot: int, pooling: Pooling | None, num_prompt_tokens: int) -> None:
        """Forget what the slot held; remember it if this is what the request wants."""
        self.release(slot)
        if pooling is not None:
            self._slots[slot] = pooling, num_prompt_tokens

    def release(self, slot: int) -> None:
        """The slot is free; releasing a free one is no error."""
        self._slots.pop(slot, None)

    def of_step(self, hidden: Tensor, step: StepInput) -> list[PooledRows]:
        """Of the prompts that end in this step. hidden: [T, H] final hidden states, the same on every rank; all ranks
        call it with the same step. Reads nothing back."""
        by_labels: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        lengths = step.batch.host_context_lengths
        for row, slot in enumerate(step.slots.tolist()) if self._slots else ():
            pooling, num_prompt_tokens = self._slots.get(slot, (None, 0))
            if pooling is not None and lengths[row] == num_prompt_tokens:
                by_labels.setdefault(pooling.labels, []).append((row, pooling.dimensions))
        pooled = []
        for labels, entries in by_labels.items():
            rows = [row for row, _ in entries]
            last = self._device.tensor(step.batch.host_query_start[1:][rows].astype(np.int64) - 1)
            sizes = [len(labels) or dimensions for _, dimensions in entries]
            pooled.append(PooledRows(rows, sizes, self._pool(hidden[last], labels, sizes)))
        return pooled

    def _pool(self, last: Tensor, labels: tuple[int, ...], sizes: list[int]) -> Tensor:
        """[n, H] -> float32 [n, labels], or [n, H]."""
        if labels:
            return torch.cat(
                [self._probabilities(part, labels) for part in torch.split(last, HEAD_ROWS // len(labels))]
            )
        last = last.float()
        if min(sizes) < last.shape[1]:
            kept = self._device.tensor(np.arange(last.shape[1]) < np.array(sizes)[:, None])
            last = last * kept
        return torch.nn.functional.normalize(last, dim=1)

    def _probabilities(self, last: Tensor, labels: tuple[int, ...]) -> Tensor:
        logits = self._logits(last).repeat_interleave(len(labels), 0)
        ids = self._device.tensor(np.tile(np.array(labels, dtype=np.int64), len(last)))
        return self._sampler.logprobs_of(logits, ids, 0).logprobs.view(len(last), -1).softmax(1)
