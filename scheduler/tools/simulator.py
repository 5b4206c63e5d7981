"""The real scheduler core against a cost model in place of the ranks: hours of serving in seconds, without a GPU.

Time is simulated. Steps run one after the other, each for as long as the cost model says, while up to two are in
flight; every row that samples gets a filler token (with drafts one or more, at random) until its request's output is as
long as the workload says, then an end token. What is measured is what the core decides: order, batching, cache hits,
retractions.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.messages import StepResult, pack_ids
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.cost import Work
from vibe_sgl_lite.scheduler.tools.workloads import FILLER, Arrival

END = 1
_BINS_PER_E = 20  # histogram: 5 % wide bins
_SMALLEST_S = 1e-6


class StepCost(msgspec.Struct, frozen=True):
    """Seconds of a step = base_s + token_s * tokens + context_s * context + read_s * reads; see scheduler/cost.py."""

    base_s: float
    token_s: float
    context_s: float
    read_s: float = 0.0

    @classmethod
    def calibrated(cls, figures: dict[str, Any], decode_rows: int) -> StepCost:
        """From a benchmark run's figures: `prefill_tokens_per_second`, and `decode_tokens_per_second` of so many rows.

        Raises ValueError when one is missing or no positive number.
        """
        rates = []
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            rate = figures.get(name)
            if not isinstance(rate, int | float) or not rate > 0:
                raise ValueError(f"{name}={rate!r}: the benchmark's JSON must hold a positive number")
            rates.append(float(rate))
        token_s = 1 / rates[0]
        step_s = decode_rows / rates[1]
        return cls(base_s=max(0.0, step_s - decode_rows * token_s), token_s=token_s, context_s=token_s / 4000)

    def seconds(self, work: Work) -> float:
        linear = self.token_s * work.tokens + self.context_s * work.context + self.read_s * work.reads
        return self.base_s + linear


class Histogram:
    """Counts by size in bins of equal ratio, so that a million values cost nothing. Values in seconds."""

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}
        self.count = 0
        self.largest = 0.0

    def add(self, value: float, count: int = 1) -> None:
        index = int(math.log(max(value, _SMALLEST_S) / _SMALLEST_S) * _BINS_PER_E)
        self._bins[index] = self._bins.get(index, 0) + count
        self.count += count
        self.largest = max(self.largest, value)

    def percentile(self, share: float) -> float:
        """The value below which `share` (0..1) of the values lie, to 5 %; 0 when there is none."""
        left = share * self.count
        for index in sorted(self._bins):
            left -= self._bins[index]
            if left <= 0:
                return min(self.largest, _SMALLEST_S * math.exp((index + 0.5) / _BINS_PER_E))
        return self.largest


class Report(msgspec.Struct):
    """What one simulated run came to. Times in (simulated) seconds; rates a simulated second.

    fairness: Jain's index of the requests' seconds from arrival to end per token of prompt and output, 1 is equal.
    """

    policy: str
    requests: int
    rejected: int
    seconds: float
    output_tokens_per_second: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    longest_wait_s: float
    hit_rate: float
    retractions: int
    fairness: float
    steps: int


class Simulation:
    """One run of one configuration. acceptance: how likely the next draft of a row holds, 0 to 1."""

    def __init__(self, config: SchedulerConfig, cost: StepCost, acceptance: float = 0.0) -> None:
        self.core = Scheduler(config)
        self.now = 0.0
        self._cost = cost
        self._acceptance = acceptance
        self._rng = random.Random(0)
        self._known: dict[int, int] = {}  # uid -> tokens on the ranks, with drafts
        self._results: deque[tuple[float, StepResult]] = deque()  # when it is back, and what
        self._rank_free_at = 0.0
        self._ends_at: dict[int, int] = {}  # live uid -> total tokens at which it ends
        self._arrived: dict[int, tuple[float, int]] = {}
        self._last_token: dict[int, float] = {}
        self._ttft, self._itl = Histogram(), Histogram()
        self._rejected = self._finished = 0
        self._slowness_sum = self._slowness_squares = 0.0

    def run(self, arrivals: Iterable[Arrival]) -> Report:
        """Serve all arrivals, which come in order of time, to their end."""
        source = iter(arrivals)
        arrival = next(source, None)
        while True:
            while arrival is not None and arrival.time <= self.now:
                self._arrive(arrival)
                arrival = next(source, None)
            self._start_steps()
            next_arrival = arrival.time if arrival is not None else math.inf
            if self._results and self._results[0][0] <= next_arrival:
                self.now, result = self._results.popleft()
                self._complete(result)
            elif arrival is not None:
                self.now = next_arrival
            else:
                assert self.core.idle
                return self._report()

    def _arrive(self, arrival: Arrival) -> None:
        message = arrival.message
        if self.core.add(message, self.now) is not None:
            self._rejected += message.sampling.n
            return
        prompt = len(message.token_ids) // 4
        for uid in range(message.uid, message.uid + message.sampling.n):
            self._ends_at[uid] = prompt + arrival.output_tokens
            self._arrived[uid] = (arrival.time, prompt)

    def _start_steps(self) -> None:
        core, ends_at = self.core, self._ends_at
        while core.schedule(self.now) is not None:
            step = core.newest_step
            assert step is not None
            counts = array("i")
            if core.config.draft_tokens:
                ids = self._yield_drafts(step, counts)
            else:
                ids = array("i", [FILLER]) * len(step.decode)
                for row, request in enumerate(step.decode):
                    # a request that has ended meanwhile still has a row; its result is dropped
                    if request.num_computed_tokens + 1 >= ends_at.get(request.uid, 0):
                        ids[row] = END
            for chunk in step.chunks:
                last = chunk.end + 1 >= ends_at.get(chunk.request.uid, 0)
                ids.append(-1 if not chunk.samples else END if last else FILLER)
                self._known[chunk.request.uid] = chunk.end + 1
            if counts:
                counts.extend(int(chunk.samples) for chunk in step.chunks)
                ids = array("i", [token for token in ids if token != -1])
            seconds = self._cost.seconds(step.work)
            self._rank_free_at = max(self.now, self._rank_free_at) + seconds
            drafted = [] if step.tokens is None else [count - 1 for count in step.tokens] + [0] * len(step.chunks)
            result = StepResult(
                step.number, ids.tobytes(), forward_s=seconds, total_s=seconds, counts=counts.tobytes(),
                drafted=pack_ids(drafted),
            )  # fmt: skip
            self._results.append((self._rank_free_at, result))

    def _yield_drafts(self, step: Step, counts: array[int]) -> array[int]:
        """The tokens of the decode rows behind each other, and in `counts` how many are each row's."""
        ids = array("i")
        for request, planned in zip(step.decode, step.tokens or repeat(1), strict=False):
            count = 1
            while count < planned and self._rng.random() < self._acceptance:
                count += 1
            self._known[request.uid] = known = self._known[request.uid] + count
            past = known - self._ends_at.get(request.uid, 0)
            ids.extend([FILLER] * (count - 1 - past) + [END] * (past + 1) if 0 <= past < count else [FILLER] * count)
            counts.append(count)
        return ids

    def _complete(self, result: StepResult) -> None:
        now, last_token = self.now, self._last_token
        gaps: dict[float, int] = {}
        outputs = self.core.complete(result, now)
        yielded = [(uid, 1) for uid, _ in outputs.next_tokens]
        yielded += [(output.uid, len(output.token_ids) // 4) for output in outputs.tokens]
        for uid, count in yielded:
            before = last_token.get(uid)
            if before is None:
                self._ttft.add(now - self._arrived[uid][0])
            else:
                gap = (now - before) / count
                gaps[gap] = gaps.get(gap, 0) + count
            last_token[uid] = now
        for output in outputs.tokens:
            if output.finish is not None:
                self._end(output.uid, output.first + len(output.token_ids) // 4)
        for gap, count in gaps.items():
            self._itl.add(gap, count)

    def _end(self, uid: int, generated: int) -> None:
        arrived, prompt = self._arrived.pop(uid)
        slowness = (self.now - arrived) / (prompt + generated)
        self._slowness_sum += slowness
        self._slowness_squares += slowness * slowness
        self._finished += 1
        del self._ends_at[uid], self._last_token[uid], self._known[uid]

    def _report(self) -> Report:
        stats = self.core.stats()
        squares = self._finished * self._slowness_squares
        return Report(
            policy=self.core.config.policy,
            requests=self._finished,
            rejected=self._rejected,
            seconds=self.now,
            output_tokens_per_second=int(stats["completion_tokens_total"]) / self.now if self.now else 0.0,
            ttft_p50_s=self._ttft.percentile(0.5),
            ttft_p99_s=self._ttft.percentile(0.99),
            itl_p50_s=self._itl.percentile(0.5),
            itl_p99_s=self._itl.percentile(0.99),
            longest_wait_s=self._ttft.largest,
            hit_rate=int(stats["cached_tokens_total"]) / max(1, int(stats["prompt_tokens_total"])),
            retractions=int(stats["num_retractions"]),
            fairness=self._slowness_sum**2 / squares if squares else 1.0,
            steps=int(stats["steps_total"]),
        )
