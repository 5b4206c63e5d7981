"""A slow sampler in numpy and plain Python, written from the specification, and what the sampler's tests share."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.sampler import ArgmaxFunction, Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling

Floats = npt.NDArray[np.float64]
MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def params(**fields: Any) -> ResolvedSampling:
    """Concrete parameters: the documented defaults, no end tokens, seed 0, unless given."""
    return ResolvedSampling(**{**DEFAULTS, "seed": 0, "end_token_ids": (), **fields})


# ------------------------------------------------------------------------------------------------ one row, slowly


def adjusted(logits: Floats, p: ResolvedSampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> Floats:
    """Penalties, then bias, then end and stop tokens held back."""
    x = logits.astype(np.float64).copy()
    for token in {*prompt, *generated}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(generated):
        x[token] -= p.frequency_penalty * list(generated).count(token) + p.presence_penalty
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if len(generated) < p.min_new_tokens:
        for token in (*p.end_token_ids, *p.stop_token_ids):
            x[token] = -np.inf
    return x


def kept_mask(x: Floats, p: ResolvedSampling) -> npt.NDArray[np.bool_]:
    """Temperature, top-k, top-p on what top-k left, min-p. Equal logits rank by id."""
    order = np.lexsort((np.arange(len(x)), -x))
    scaled = x[order] / p.temperature
    probabilities = np.exp(scaled - scaled[0])
    length = len(x) if p.top_k == -1 else min(p.top_k, len(x))
    if p.top_p < 1.0:
        mass = np.cumsum(probabilities[:length])
        length = min(length, int(np.searchsorted(mass, p.top_p * mass[-1])) + 1)
    if p.min_p > 0.0:
        length = min(length, int((probabilities >= p.min_p).sum()))
    mask = np.zeros(len(x), bool)
    mask[order[:length]] = True
    return mask


def distribution(x: Floats, p: ResolvedSampling) -> Floats:
    """The probabilities that a draw from adjusted logits has."""
    scaled = np.where(kept_mask(x, p), x / p.temperature, -np.inf)
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def splitmix(state: int) -> int:
    """SplitMix64's output function, in unbounded integers."""
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def token_bits(key: int, token: int) -> int:
    """The 52 bits of a token, in unbounded integers."""
    x = key + (token + 1) * (key >> 32 | 1) & MASK_32
    x = (x ^ x >> 16) * 0x21F0AAAD & MASK_32
    x = (x ^ x >> 15) * 0x735A2D97 & MASK_32
    x ^= x >> 15
    return x << 20 | (x * 0x85EBCA6B + key & MASK_32) >> 12


def noise(seed: int, position: int, vocab_size: int) -> Floats:
    """Gumbel noise of every token."""
    key = splitmix((splitmix((seed + 0x9E3779B97F4A7C15) & MASK_64) + position) & MASK_64)
    bits = [token_bits(key, token) for token in range(vocab_size)]
    uniform: Floats = (np.array(bits, np.float64) + 0.5) / 2.0**52
    gumbel: Floats = -np.log(-np.log(uniform))
    return gumbel


def draw(x: Floats, p: ResolvedSampling, position: int) -> int:
    """The token that adjusted logits, parameters, seed and position decide on."""
    if p.greedy:
        return int(np.argmax(x))
    scores = np.where(kept_mask(x, p), x / p.temperature + noise(p.seed, position, len(x)), -np.inf)
    return int(np.argmax(scores))


# ------------------------------------------------------------------------------------------- driving the sampler


@dataclass(frozen=True)
class Row:
    logits: Tensor
    params: ResolvedSampling
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.generated)

    def expected(self) -> int:
        x = adjusted(self.logits.to(torch.float64).numpy(), self.params, self.prompt, self.generated)
        return draw(x, self.params, self.position)


def make_sampler(rows: Sequence[Row], group: Group | None = None, argmax: ArgmaxFunction | None = None) -> Sampler:
    """A sampler with row i in slot i."""
    tokens = torch.zeros((len(rows), max(row.position for row in rows) + 1), dtype=torch.int32)
    sampler = Sampler(len(rows[0].logits), group or Group(), tokens, argmax)
    for slot, row in enumerate(rows):
        tokens[slot, : row.position] = torch.tensor([*row.prompt, *row.generated], dtype=torch.int32)
        sampler.admit(slot, row.params, len(row.prompt))
    return sampler


def sample(rows: Sequence[Row], group: Group | None = None, argmax: ArgmaxFunction | None = None) -> Tensor:
    """Draw for all rows in one batch; with a group, from this rank's columns of the logits."""
    sampler = make_sampler(rows, group, argmax)
    logits = torch.stack([row.logits for row in rows])[:, sampler.vocab].contiguous()
    positions = np.array([row.position for row in rows], np.int64)
    return sampler.sample(logits, np.arange(len(rows)), positions).token_ids


# --------------------------------------------------------------------------------------------- ranks in one process

T = TypeVar("T")


@dataclass
class _Meeting:
    """Where the threads that play ranks exchange tensors."""

    size: int
    barrier: threading.Barrier = field(init=False)
    tensors: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


class ThreadGroup(Group):
    """A process group whose ranks are threads of one process, so that a test may run many small cases."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "size", meeting.size)
        object.__setattr__(self, "process_group", None)
        object.__setattr__(self, "meeting", meeting)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        meeting: _Meeting = self.__dict__["meeting"]
        meeting.tensors[self.rank] = x.clone()
        meeting.barrier.wait()
        every = [meeting.tensors[rank] for rank in range(self.size)]
        assert len({(t.shape, t.dtype) for t in every}) == 1
        meeting.barrier.wait()
        return every

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x)).amax(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x))


def on_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """Run `work(group)` on `size` ranks; what each of them returned. Raises what a rank raised."""
    meeting = _Meeting(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, meeting))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [results[rank] for rank in range(size)]


# ------------------------------------------------------------------------------------------------------- statistics


def chi_square_p(counts: Floats, probabilities: Floats) -> float:
    """Probability of so bad a fit by chance. Tokens of small expectation are pooled; drawing one of none gives 0."""
    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = probabilities * counts.sum()
    small = expected < 8
    pooled = expected[small].sum()
    observed, expected = counts[~small], expected[~small]
    if pooled >= 8:
        observed, expected = np.append(observed, counts[small].sum()), np.append(expected, pooled)
    if len(expected) < 2:
        return 1.0
    expected *= observed.sum() / expected.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))
