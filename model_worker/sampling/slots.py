"""Sampling parameters of every slot, and the plan of a step: which rows need what, with their parameters as tensors.

What a row needs is decided on the host from the host's own copies, so planning never waits for the device, and a plan
holds as long as the rows and their parameters stay the same (the common case of pure decode).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

# Filters that leave at most this many tokens are decided on that many sorted candidates a row.
MAX_CANDIDATES = 256
# Candidates of a row whose filters may leave any number: enough for the usual nucleus.
USUAL_CANDIDATES = 64
KEPT_PLANS = 16  # with drafts, a slot comes more than once, now so often and now so


@dataclass(frozen=True)
class Filters:
    """Of one row; as `FilterPlan` has them."""

    top_k: int
    top_p: float
    max_distance: float


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
    logprob_rows: indices of rows that asked for logprobs, logprob_index: the same on the device, None when there are
    none; top_counts: how many alternatives each of them wants.
    """

    greedy: Tensor | None
    unfiltered: Tensor | None
    filtered: FilterPlan | None
    penalties: PenaltyPlan | None
    bias: EntryPlan | None
    held_back: EntryPlan | None
    inverse_temperature: Tensor
    seeds: Tensor
    logprob_rows: list[int]
    logprob_index: Tensor | None
    top_counts: list[int]

    @property
    def all_greedy(self) -> bool:
        return self.unfiltered is None and self.filtered is None


# A slot's parameters, one record each, so that a plan takes its rows' columns and never goes over rows in Python.
_RECORD = np.dtype(
    [
        ("occupied", np.bool_),
        ("num_prompt_tokens", np.int64),
        ("seed", np.int64),  # its 64 bits
        ("greedy", np.bool_),
        ("filtered", np.bool_),
        ("inverse_temperature", np.float64),
        ("top_k", np.int64),  # the vocabulary size when off
        ("top_p", np.float64),
        ("max_distance", np.float64),
        ("penalised", np.bool_),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("biased", np.bool_),
        ("held_back", np.bool_),
        ("logprobs", np.bool_),
        ("top_logprobs", np.int64),
    ],
    align=True,
)
Records = npt.NDArray[np.void]


class SlotSampling:
    """What each occupied slot samples with. `vocab`: this rank's range of a vocabulary of `vocab_size` ids."""

    def __init__(self, max_slots: int, vocab_size: int, vocab: slice, device: Device) -> None:
        self.vocab_size = vocab_size
        self.vocab = vocab
        self.device = device
        self._records = np.zeros(max_slots, dtype=_RECORD)
        self._single: dict[int, ResolvedSampling] = {}  # of slots where single logits are changed
        self._plans: dict[bytes, SamplingPlan] = {}

    def admit(self, slot: int, sampling: ResolvedSampling, num_prompt_tokens: int) -> None:
        """Forget what the slot held and take these parameters; sampling.seed is the sample's own (64 bits)."""
        self.release(slot)
        self._plans.clear()
        p = sampling
        top_k = p.top_k if 0 < p.top_k < self.vocab_size else self.vocab_size
        biased = bool(p.logit_bias)
        held_back = p.min_new_tokens > 0 and bool(p.end_token_ids or p.stop_token_ids)
        self._records[slot] = (
            True,
            num_prompt_tokens,
            p.seed - (1 << 64) if p.seed >= 1 << 63 else p.seed,
            p.greedy,
            not p.greedy and (top_k < self.vocab_size or p.top_p < 1.0 or p.min_p > 0.0),
            1.0 if p.greedy else 1.0 / p.temperature,
            top_k,
            min(p.top_p, 1.0),
            -math.log(p.min_p) if p.min_p > 0.0 else math.inf,
            p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0,
            p.repetition_penalty,
            p.frequency_penalty,
            p.presence_penalty,
            biased,
            held_back,
            p.logprobs,
            p.top_logprobs,
        )
        if biased or held_back:
            self._single[slot] = sampling

    def release(self, slot: int) -> None:
        """The slot is free; releasing a free one is no error."""
        self._records[slot]["occupied"] = False
        self._single.pop(slot, None)

    def is_plain(self, slot: int) -> bool:
        """Whether its row draws from its logits as they are, filtered or not, and asks for nothing more."""
        record = self._records[slot]
        return not any(record[name] for name in ("penalised", "biased", "held_back", "logprobs"))

    def filters(self, slot: int) -> Filters | None:
        record = self._records[slot]
        if not record["filtered"]:
            return None
        return Filters(int(record["top_k"]), float(record["top_p"]), float(record["max_distance"]))

    def plan(self, slots: npt.NDArray[np.int64]) -> SamplingPlan:
        """The plan for these rows' slots, in order. Every slot must be occupied. The last few plans are kept."""
        key = slots.tobytes()
        if key not in self._plans:
            if len(self._plans) == KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(slots)
        return self._plans[key]

    def _make_plan(self, slots: npt.NDArray[np.int64]) -> SamplingPlan:
        records = self._records[slots]
        assert records["occupied"].all(), "a row of a free slot"
        greedy, filtered = records["greedy"], records["filtered"]
        logprob_rows = np.flatnonzero(records["logprobs"])
        return SamplingPlan(
            greedy=self._rows(greedy),
            unfiltered=self._rows(~(greedy | filtered)),
            filtered=self._plan_filters(records) if filtered.any() else None,
            penalties=self._plan_penalties(slots, records) if records["penalised"].any() else None,
            bias=self._plan_bias(slots, records) if records["biased"].any() else None,
            held_back=self._plan_held_back(slots, records) if records["held_back"].any() else None,
            inverse_temperature=self._column(records, "inverse_temperature"),
            seeds=self._column(records, "seed"),
            logprob_rows=logprob_rows.tolist(),
            logprob_index=self._rows(records["logprobs"]),
            top_counts=records["top_logprobs"][logprob_rows].tolist(),
        )

    def _plan_filters(self, records: Records) -> FilterPlan:
        rows = np.flatnonzero(records["filtered"])
        chosen = records[rows]
        top_k = chosen["top_k"]
        wanted = int(np.where(top_k <= MAX_CANDIDATES, top_k, USUAL_CANDIDATES).max())
        candidates = min(wanted, self.vocab_size)
        return FilterPlan(
            rows=self._device(rows),
            top_k=self._column(chosen, "top_k"),
            top_p=self._column(chosen, "top_p"),
            max_distance=self._column(chosen, "max_distance"),
            needs_total=self._device(np.flatnonzero((chosen["top_p"] < 1.0) & (top_k == self.vocab_size))),
            candidates=candidates,
            may_be_undecided=int(top_k.max()) > candidates,
        )

    def _plan_penalties(self, slots: npt.NDArray[np.int64], records: Records) -> PenaltyPlan:
        rows = np.flatnonzero(records["penalised"])
        chosen = records[rows]
        return PenaltyPlan(
            rows=self._device(rows),
            slots=self._device(slots[rows]),
            prompt_lens=self._column(chosen, "num_prompt_tokens"),
            repetition=self._column(chosen, "repetition"),
            frequency=self._column(chosen, "frequency"),
            presence=self._column(chosen, "presence"),
            host_rows=rows,
            host_prompt_lens=chosen["num_prompt_tokens"].copy(),
            over_prompt=bool((chosen["repetition"] != 1.0).any()),
        )

    def _plan_bias(self, slots: npt.NDArray[np.int64], records: Records) -> EntryPlan:
        entries = [
            (row, token, bias)
            for row in np.flatnonzero(records["biased"]).tolist()
            for token, bias in self._single[int(slots[row])].logit_bias.items()
        ]
        here = [entry for entry in entries if self._is_here(entry[1])]
        values = self._device(np.array([entry[2] for entry in here], dtype=np.float32))
        return EntryPlan(self._ints([entry[0] for entry in here]), self._columns(here), values)

    def _plan_held_back(self, slots: npt.NDArray[np.int64], records: Records) -> EntryPlan:
        entries = []
        for row in np.flatnonzero(records["held_back"]).tolist():
            p = self._single[int(slots[row])]
            first = int(records[row]["num_prompt_tokens"]) + p.min_new_tokens
            entries += [(row, token, first) for token in {*p.end_token_ids, *p.stop_token_ids}]
        here = [entry for entry in entries if self._is_here(entry[1])]
        return EntryPlan(
            self._ints([entry[0] for entry in here]), self._columns(here), self._ints([entry[2] for entry in here])
        )

    def _is_here(self, token_id: int) -> bool:
        return bool(self.vocab.start <= token_id < self.vocab.stop)

    def _columns(self, entries: Sequence[tuple[int, int, float]]) -> Tensor:
        return self._ints([token_id - self.vocab.start for _, token_id, _ in entries])

    def _ints(self, values: Sequence[int]) -> Tensor:
        return self._device(np.array(values, dtype=np.int64))

    def _rows(self, which: npt.NDArray[np.bool_]) -> Tensor | None:
        """Indices of the rows that are marked; None when there are none."""
        rows = np.flatnonzero(which)
        return self._device(rows) if len(rows) else None

    def _column(self, records: Records, name: str) -> Tensor:
        return self._device(records[name].copy())

    def _device(self, array: npt.NDArray[Any]) -> Tensor:
        return self.device.tensor(array)
