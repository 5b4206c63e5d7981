"""Sampling parameters of every slot, and the plan of a step: which rows need what, with their parameters as tensors.

What a row needs is decided on the host from the host's own copies, so planning never waits for the device, and a plan
holds as long as the rows and their parameters stay the same (the common case of pure decode).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.sampling_params import ResolvedSampling

# Filters that leave at most this many tokens are decided on that many sorted candidates a row.
MAX_CANDIDATES = 256
# Candidates of a row whose filters may leave any number: enough for the usual nucleus.
USUAL_CANDIDATES = 64


@dataclass(frozen=True)
class FilterPlan:
    """Rows that draw from a filtered distribution. All tensors [n].

    rows: int64 index of the batch. top_k: int64, the vocabulary size when off. top_p: float64, 1.0 when off.
    max_distance: float64, how far below the best scaled logit min_p reaches; inf when off.
    needs_total: int64, those of the n whose nucleus is measured against the mass of the whole vocabulary.
    candidates: how many sorted ones to look at. may_be_undecided: some row may keep more than these.
    """

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    max_distance: Tensor
    needs_total: Tensor
    candidates: int
    may_be_undecided: bool

    def subset(self, index: Tensor) -> "FilterPlan":
        """The plan of rows `index` (int64 [m], ascending) of the n."""
        return FilterPlan(
            rows=self.rows[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            max_distance=self.max_distance[index],
            needs_total=torch.isin(index, self.needs_total).nonzero()[:, 0],
            candidates=self.candidates,
            may_be_undecided=self.may_be_undecided,
        )


@dataclass(frozen=True)
class PenaltyPlan:
    """Rows with penalties, all [n]. rows: int64 of the batch; slots, prompt_lens: int64; the rest float32.

    host_rows, host_prompt_lens: the same on the host. over_prompt: some row's repetition penalty is on.
    """

    rows: Tensor
    slots: Tensor
    prompt_lens: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    host_rows: npt.NDArray[np.int64]
    host_prompt_lens: npt.NDArray[np.int64]
    over_prompt: bool


@dataclass(frozen=True)
class EntryPlan:
    """Single logits to change: rows, columns (of this rank's shard) int64 [n], values [n].

    For a bias the values are float32 addends; for held-back end tokens int64, the first position that may have them.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True)
class SamplingPlan:
    """One batch of rows. `greedy`, `unfiltered`: int64 indices of rows, None when there are none.

    inverse_temperature: float64 [rows]. seeds: int64 [rows].
    logprob_rows: host indices of rows that asked for logprobs; top_counts: how many alternatives each of them wants.
    """

    num_rows: int
    greedy: Tensor | None
    unfiltered: Tensor | None
    filtered: FilterPlan | None
    penalties: PenaltyPlan | None
    bias: EntryPlan | None
    held_back: EntryPlan | None
    inverse_temperature: Tensor
    seeds: Tensor
    logprob_rows: list[int]
    top_counts: list[int]

    @property
    def all_greedy(self) -> bool:
        return self.unfiltered is None and self.filtered is None


@dataclass(frozen=True)
class _Slot:
    sampling: ResolvedSampling
    num_prompt_tokens: int


class SlotSampling:
    """What each occupied slot samples with. `vocab`: this rank's range of a vocabulary of `vocab_size` ids."""

    def __init__(self, vocab_size: int, vocab: slice, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.vocab = vocab
        self.device = device
        self._slots: dict[int, _Slot] = {}
        self._cached: tuple[bytes, SamplingPlan] | None = None

    def admit(self, slot: int, sampling: ResolvedSampling, num_prompt_tokens: int) -> None:
        """Forget what the slot held and take these parameters; sampling.seed is the sample's own (64 bits)."""
        self._slots[slot] = _Slot(sampling, num_prompt_tokens)
        self._cached = None

    def release(self, slot: int) -> None:
        """The slot is free; releasing a free one is no error."""
        self._slots.pop(slot, None)

    def plan(self, slots: npt.NDArray[np.int64]) -> SamplingPlan:
        """The plan for these rows' slots, in order. Every slot must be occupied. The last plan is kept."""
        key = slots.tobytes()
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._make_plan(slots.tolist()))
        return self._cached[1]

    def _make_plan(self, slots: Sequence[int]) -> SamplingPlan:
        states = [self._slots[slot] for slot in slots]
        params = [state.sampling for state in states]
        greedy = [i for i, p in enumerate(params) if p.greedy]
        filtered = [i for i, p in enumerate(params) if not p.greedy and self._filters(p)]
        unfiltered = [i for i, p in enumerate(params) if not p.greedy and not self._filters(p)]
        logprob_rows = [i for i, p in enumerate(params) if p.logprobs]
        return SamplingPlan(
            num_rows=len(slots),
            greedy=self._ints(greedy) if greedy else None,
            unfiltered=self._ints(unfiltered) if unfiltered else None,
            filtered=self._plan_filters(filtered, params) if filtered else None,
            penalties=self._plan_penalties(slots, states),
            bias=self._plan_bias(params),
            held_back=self._plan_held_back(states),
            inverse_temperature=self._doubles([1.0 if p.greedy else 1.0 / p.temperature for p in params]),
            seeds=self._ints([p.seed - (1 << 64) if p.seed >= 1 << 63 else p.seed for p in params]),
            logprob_rows=logprob_rows,
            top_counts=[params[i].top_logprobs for i in logprob_rows],
        )

    def _filters(self, p: ResolvedSampling) -> bool:
        return 0 < p.top_k < self.vocab_size or p.top_p < 1.0 or p.min_p > 0.0

    def _plan_filters(self, rows: list[int], params: list[ResolvedSampling]) -> FilterPlan:
        chosen = [params[i] for i in rows]
        top_k = [p.top_k if 0 < p.top_k < self.vocab_size else self.vocab_size for p in chosen]
        wanted = max(k if k <= MAX_CANDIDATES else USUAL_CANDIDATES for k in top_k)
        candidates = min(wanted, self.vocab_size)
        return FilterPlan(
            rows=self._ints(rows),
            top_k=self._ints(top_k),
            top_p=self._doubles([min(p.top_p, 1.0) for p in chosen]),
            max_distance=self._doubles([-float(np.log(p.min_p)) if p.min_p > 0.0 else float("inf") for p in chosen]),
            needs_total=self._ints([i for i, p in enumerate(chosen) if p.top_p < 1.0 and top_k[i] == self.vocab_size]),
            candidates=candidates,
            may_be_undecided=max(top_k) > candidates,
        )

    def _plan_penalties(self, slots: Sequence[int], states: list[_Slot]) -> PenaltyPlan | None:
        rows = [i for i, state in enumerate(states) if _penalised(state.sampling)]
        if not rows:
            return None
        chosen = [states[i].sampling for i in rows]
        prompt_lens = [states[i].num_prompt_tokens for i in rows]
        return PenaltyPlan(
            rows=self._ints(rows),
            slots=self._ints([slots[i] for i in rows]),
            prompt_lens=self._ints(prompt_lens),
            repetition=self._floats([p.repetition_penalty for p in chosen]),
            frequency=self._floats([p.frequency_penalty for p in chosen]),
            presence=self._floats([p.presence_penalty for p in chosen]),
            host_rows=np.array(rows, np.int64),
            host_prompt_lens=np.array(prompt_lens, np.int64),
            over_prompt=any(p.repetition_penalty != 1.0 for p in chosen),
        )

    def _plan_bias(self, params: list[ResolvedSampling]) -> EntryPlan | None:
        entries = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias.items()]
        here = [entry for entry in entries if self._is_here(entry[1])]
        if not entries:
            return None
        return EntryPlan(self._ints([e[0] for e in here]), self._columns(here), self._floats([e[2] for e in here]))

    def _plan_held_back(self, states: list[_Slot]) -> EntryPlan | None:
        entries = [
            (i, token, state.num_prompt_tokens + state.sampling.min_new_tokens)
            for i, state in enumerate(states)
            if state.sampling.min_new_tokens > 0
            for token in {*state.sampling.end_token_ids, *state.sampling.stop_token_ids}
        ]
        here = [entry for entry in entries if self._is_here(entry[1])]
        if not entries:
            return None
        return EntryPlan(self._ints([e[0] for e in here]), self._columns(here), self._ints([e[2] for e in here]))

    def _is_here(self, token_id: int) -> bool:
        return bool(self.vocab.start <= token_id < self.vocab.stop)

    def _columns(self, entries: Sequence[tuple[int, int, float]]) -> Tensor:
        return self._ints([token_id - self.vocab.start for _, token_id, _ in entries])

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _doubles(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


def _penalised(p: ResolvedSampling) -> bool:
    return p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0
