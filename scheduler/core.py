"""The scheduler: a pure object that turns requests and results into steps and outputs.

It has no sockets, no clock, no torch and no globals; time comes in as arguments, in seconds of any monotonic clock. The
same object is driven by the process (scheduler/process.py), by tests, by the simulator and by a recorded trace.

    core.py       the interface: add, abort, schedule, complete, lose_ranks ...; observer.py: who watches it;
                  refusals.py: who is not taken
    planner.py    what runs next: policies.py, fairness.py (who), admission.py (how much room), cost.py (how long),
                  speculation.py (how many drafts)
    results.py    what a result means
    state.py      where every request is (request.py), and the queue; sharing.py: who waits for whose prefix
    memory.py     pages, and the prefixes that they cache: radix_cache.py
    batch.py      what the ranks are told

Around it: process.py moves messages; tools/ records and replays, draws timelines, and simulates without ranks.

Ranks may die: `lose_ranks` puts everything that ran back into the queue, and the ranks of the next epoch go on with it.

One step: `schedule(now)` gives a `ForwardBatch` to send to every rank, or None. `complete(result, now)` takes rank 0's
answer, in order. With overlap a second step (and, if they are short, a third) may be scheduled before the first one's
result is in: a decode row's token is then not known here, but the ranks keep it. What is learned late (an end token, an
abort) costs a row of each, whose result is dropped; its slot and pages are given up when no step in flight has the row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar, cast

from vibe_sgl_lite.runtime.errors import DeadlineError, PoisonError
from vibe_sgl_lite.runtime.messages import (
    AddRequest,
    ErrorInfo,
    Finish,
    ForwardBatch,
    PageMoves,
    PagesMoved,
    RequestRejected,
    StepResult,
    unpack_ids,
)
from vibe_sgl_lite.scheduler.admission import NewTokenRatio
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.cost import CostModel
from vibe_sgl_lite.scheduler.histogram import Histogram
from vibe_sgl_lite.scheduler.observer import Call, SchedulerObserver
from vibe_sgl_lite.scheduler.planner import StepPlanner
from vibe_sgl_lite.scheduler.policies import make_policy
from vibe_sgl_lite.scheduler.refusals import too_long, why_full
from vibe_sgl_lite.scheduler.request import TOKEN_BYTES, samples_of
from vibe_sgl_lite.scheduler.results import Outputs, ResultApplier
from vibe_sgl_lite.scheduler.snapshot import Snapshot, take
from vibe_sgl_lite.scheduler.speculation import Speculation
from vibe_sgl_lite.scheduler.state import PauseMode, SchedulerState
from vibe_sgl_lite.scheduler.tiers.disk import DiskTier, TierContents
from vibe_sgl_lite.scheduler.tiers.host import HostTier

P = ParamSpec("P")
R = TypeVar("R")


def observed(method: Callable[Concatenate[Scheduler, P], R]) -> Callable[Concatenate[Scheduler, P], R]:
    """Tell the observers of each call. All arguments are given by position."""
    name = cast(Call, method.__name__)

    def call(scheduler: Scheduler, /, *args: P.args, **kwargs: P.kwargs) -> R:
        decision = method(scheduler, *args, **kwargs)
        for observer in scheduler.observers:
            observer.observe(name, args, decision, scheduler.newest_step)
        return decision

    update_wrapper(call, method)
    return call


class Scheduler:
    """See the module. Raises ConfigError for an unknown policy."""

    def __init__(self, config: SchedulerConfig, observers: Sequence[SchedulerObserver] = ()) -> None:
        self.config = config
        self.observers = observers
        self.state = SchedulerState(config)
        self.cost = CostModel(config.base_tokens)
        self._ratio = NewTokenRatio(config.conservativeness)
        self.speculation = Speculation(config, self.cost)
        self._planner = StepPlanner(self.state, make_policy(config.policy), self._ratio, self.cost, self.speculation)
        self._results = ResultApplier(self.state, self.speculation)
        self._max_in_flight = 2 if config.overlap else 1
        self._arrivals = 0
        self._step_tokens = Histogram()
        self._step_s = 0.0
        self._deadlines: list[tuple[float, int]] = []  # when, and whose

    # -------------------------------------------------------------------------------------------------------- inputs

    @observed
    def add(self, message: AddRequest, now: float) -> RequestRejected | None:
        """Queue a request; returns the refusal of one that cannot fit the empty pool or finds the queue full."""
        state, sampling = self.state, message.sampling
        assert message.token_ids
        assert message.uid not in state.groups
        seq = self._arrivals
        self._arrivals += sampling.n
        error = too_long(state.memory, len(message.token_ids) // TOKEN_BYTES, sampling.max_new_tokens)
        error = error or why_full(state, message)
        if error is not None:
            return RequestRejected(message.uid, error)
        for sample in samples_of(message, seq, now):
            state.enqueue(sample)
            if message.timeout_s is not None:
                heapq.heappush(self._deadlines, (now + message.timeout_s, sample.uid))
        if len(self._deadlines) > 2 * len(state.requests) + 100:  # mostly of requests that are long done
            self._deadlines = sorted(deadline for deadline in self._deadlines if deadline[1] in state.requests)
        return None

    @observed
    def expire(self, now: float) -> Outputs:
        """End every sample whose deadline has come, as an error."""
        outputs, deadlines = Outputs(), self._deadlines
        while deadlines and (deadlines[0][0] <= now or deadlines[0][1] not in self.state.requests):
            request = self.state.requests.get(heapq.heappop(deadlines)[1])
            if request is not None:
                text = f"timeout_s is over: {now - request.arrival:.1f} s after its arrival"
                self._results.end(request, Finish("error", error=ErrorInfo(DeadlineError.code, text)), outputs)
        return outputs

    @property
    def next_deadline(self) -> float:
        """When `expire` may have something to do; infinite when not."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    @observed
    def abort(self, uid: int, now: float) -> Outputs:
        """End every sample of a request with finish reason "abort"; an unknown uid is ignored."""
        outputs = Outputs()
        for sample in list(self.state.groups.get(uid, ())):
            self._results.end(self.state.requests[sample], Finish("abort"), outputs)
        return outputs

    @observed
    def stop_matched(self, uid: int, now: float) -> None:
        """The detokenizer has ended this sample at a stop string; one that is not there any more is ignored."""
        request = self.state.requests.get(uid)
        if request is not None:
            self.state.finish(request)

    # --------------------------------------------------------------------------------------------------------- ranks

    @observed
    def lose_ranks(self, epoch: int, now: float) -> Outputs:
        """The rank group is gone; that of `epoch` is to come. Every request that ran waits again, with its tokens.

        One that several groups have been lost with ends as an error. Nothing runs until `ranks_ready`.
        """
        state, outputs = self.state, Outputs()
        assert epoch > state.epoch
        for request in state.lose_ranks(epoch):
            message = f"{request.losses} rank groups died while they ran this request, without a token in between"
            self._results.end(request, Finish("error", error=ErrorInfo(PoisonError.code, message)), outputs)
        return outputs

    @observed
    def ranks_ready(self, num_pages: int, now: float) -> Outputs:
        """The group of the newest epoch is there, with so many KV pages; requests that these cannot hold are ended."""
        state, outputs = self.state, Outputs()
        assert not state.has_ranks
        state.has_ranks = True
        if num_pages != state.memory.num_pages:
            state.memory.resize(num_pages)
            for request in list(state.requests.values()):
                error = too_long(state.memory, request.num_prompt_tokens, request.sampling.max_new_tokens)
                if error is not None:
                    self._results.end(request, Finish("error", error=error), outputs)
        return outputs

    # ---------------------------------------------------------------------------------------------- pages on the disk

    @observed
    def open_tier(self, contents: TierContents, now: float) -> None:
        """The ranks, which have run nothing yet, can store pages and load those of `contents`."""
        state = self.state
        assert state.has_ranks
        assert state.tier is None
        state.open_tier(DiskTier(contents, state.memory, self.cost, state.tier_counts, state.epoch))

    @observed
    def open_host(self, slots: int, now: float) -> None:
        """The ranks, which have run nothing yet, have memory beside their pools for so many pages."""
        state = self.state
        assert state.host is None
        state.open_host(HostTier(slots, state.memory, state.tier_counts, state.epoch))

    def has_moves(self, now: float) -> bool:
        return self.state.host is not None or (self.state.tier is not None and self.state.tier.has_moves(now))

    @observed
    def moves(self, now: float) -> list[PageMoves]:
        """What the ranks have to be told before the step that was scheduled last; if `has_moves`."""
        host, tier = self.state.host, self.state.tier
        return ([] if host is None else host.moves()) + ([] if tier is None else tier.moves(now))

    @observed
    def pages_moved(self, answer: PagesMoved, now: float) -> None:
        """A rank has done what `moves` told it."""
        state = self.state
        if answer.epoch == state.epoch and state.tier is not None and state.tier.answered(answer):
            state.num_released += 1

    # ---------------------------------------------------------------------------------------- pauses and new weights

    @observed
    def pause(self, mode: PauseMode, now: float) -> Outputs:
        """Begin no more requests until `resume`. Those that run: end now ("abort", and those that wait too), run to
        their end ("wait"), stop where they are ("keep"), or wait again, with their tokens ("retract")."""
        state, outputs = self.state, Outputs()
        state.pause = mode
        if mode == "abort":
            for request in list(state.requests.values()):
                self._results.end(request, Finish("abort"), outputs)
        elif mode == "retract":
            for request in [*state.decoding, *state.prefilling.values()]:
                state.requeue(request)
        return outputs

    @observed
    def resume(self, now: float) -> None:
        self.state.pause = None

    @property
    def quiet(self) -> bool:
        """A pause has come about: no step is in flight, and none comes before `resume`."""
        return self.state.pause is not None and not self.state.in_flight and self._holds

    @property
    def _holds(self) -> bool:
        state = self.state
        return state.pause != "wait" or not any(request.begun for request in state.requests.values())

    @observed
    def sleep(self, now: float) -> None:
        """The ranks are about to free the KV pool: every request that ran waits again, until `ranks_ready`."""
        assert self.quiet
        self.state.lose_ranks(self.state.epoch)

    @observed
    def change_weights(self, version: str, flush: bool, now: float) -> None:
        """The ranks have other weights; see `SchedulerState.change_weights`."""
        self.state.change_weights(version, flush=flush)

    # --------------------------------------------------------------------------------------------------------- steps

    def schedule(self, now: float) -> ForwardBatch | None:
        """The next step for the ranks, or None: nothing to run, or nothing before a result comes."""
        return self.plan(now) if self.can_schedule else None

    @observed
    def plan(self, now: float) -> ForwardBatch | None:
        """`schedule` once it may: there are ranks, and not too many steps in flight."""
        if not self.state.requests:
            self._ratio.idle()
            return None
        step = self._planner.plan(now)
        return None if step is None else self.state.builder.build(step)

    @observed
    def complete(self, result: StepResult, now: float) -> Outputs:
        """Apply the result of the oldest step in flight. One that comes from ranks that are lost means nothing."""
        if result.epoch != self.state.epoch:
            return Outputs()
        step = self.state.in_flight.popleft()
        assert result.step == step.number, f"result of step {result.step}, {step.number} was due"
        if step.drafts is None:
            self.cost.observe(step.work, result.total_s)
        self._step_tokens.observe(step.num_tokens(unpack_ids(result.drafted)))
        self._step_s += result.total_s
        return self._results.apply(step, result)

    @property
    def can_schedule(self) -> bool:
        """There are ranks, and fewer steps in flight than may be: three if they are short, see `SchedulerConfig`."""
        steps = self.state.in_flight
        if not self.state.has_ranks or (self.state.pause is not None and self._holds):
            return False
        return len(steps) < self._max_in_flight or self._is_soon_done(steps)

    def _is_soon_done(self, steps: Sequence[Step]) -> bool:
        return len(steps) == 2 == self._max_in_flight and sum(step.estimate_s for step in steps) < self.config.ahead_s

    @property
    def newest_step(self) -> Step | None:
        """The step that was scheduled last, while it is in flight."""
        return self.state.in_flight[-1] if self.state.in_flight else None

    @property
    def oldest_step(self) -> Step | None:
        """The step whose result is due next."""
        return self.state.in_flight[0] if self.state.in_flight else None

    @property
    def winding_down(self) -> bool:
        """No request is there any more, only steps and pages in flight that nobody waits for."""
        return not self.state.requests and bool(self.state.in_flight or self.state.memory.num_loading)

    @property
    def client_requests(self) -> list[int]:
        """The uids of all live requests, as `abort` takes them."""
        return list(self.state.groups)

    @property
    def idle(self) -> bool:
        """No request is there and nothing in flight."""
        return not (self.state.requests or self.state.in_flight or self.state.memory.num_loading)

    # ------------------------------------------------------------------------------------------------------- queries

    def close(self) -> None:
        """Finish the observers' files."""
        for observer in self.observers:
            observer.close()

    @observed
    def flush_cache(self, now: float) -> int | None:
        """Empty the radix cache, and the folder behind it; returns the pages freed.

        None: refused, requests run, are winding down, or wait without a pause.
        """
        paused = self.quiet and not (self.state.num_running or self.state.memory.num_loading)
        if not (self.idle or paused):
            return None
        if self.state.tier is not None:
            self.state.tier.forget_all()
        freed = self.state.memory.cache.flush()
        if self.state.host is not None:
            self.state.host.forget_all()
        return freed

    def snapshot(self) -> Snapshot:
        """For a person who watches."""
        return take(self.state, self.stats())

    def stats(self) -> dict[str, int | float | str | bool]:
        """Counters and gauges; pages and tokens as counts."""
        state, memory, counts = self.state, self.state.memory, self.state.tier_counts
        tier = state.tier
        return {
            "kv_pages_total": memory.num_pages,
            "kv_pages_free": memory.allocator.num_free,
            "kv_pages_cached": memory.cache.num_cached,
            "kv_pages_evictable": memory.cache.num_evictable,
            "evicted_pages_total": memory.cache.num_evicted,
            "radix_nodes": memory.cache.num_nodes,
            "num_running": state.num_running,
            "num_waiting": len(state.waiting),
            "num_retractions": state.num_retractions,
            "cached_tokens_total": state.num_cached_tokens,
            "prompt_tokens_total": state.num_prompt_tokens,
            "completion_tokens_total": self._results.num_completion_tokens,
            "drafts_total": self.speculation.drafts,
            "draft_tokens_total": self.speculation.draft_tokens,
            "accepted_tokens_total": self.speculation.accepted_tokens,
            "requests_total": self._arrivals,
            "requests_resumed_total": state.num_resumed,
            "queue_ms_total": state.queue_ms.total,
            "queue_ms_counts": state.queue_ms.counts,
            "steps_total": state.next_step,
            "step_seconds_total": self._step_s,
            "step_tokens_total": self._step_tokens.total,
            "step_tokens_counts": self._step_tokens.counts,
            "rank_restarts_total": state.epoch,
            "steps_in_flight": len(state.in_flight),
            "ranks_ready": state.has_ranks,
            "paused": state.pause is not None,
            "weight_version": state.weight_version,
            "new_token_ratio": self._ratio.value,
            "host_pages": 0 if state.host is None else state.host.num_pages,
            "host_restored_tokens_total": counts.restored * memory.page_size,
            "disk_pages": 0 if tier is None else tier.num_pages,
            "disk_bytes": 0 if tier is None else tier.used,
            "disk_stores": tier is not None and not tier.problem,
            "disk_loaded_tokens_total": counts.loaded * memory.page_size,
            "disk_stored_tokens_total": counts.stored * memory.page_size,
            "disk_evicted_tokens_total": counts.evicted * memory.page_size,
            "disk_failed_tokens_total": counts.failed * memory.page_size,
        }
