"""Where every request is, and the moves between the places. Decides nothing.

    waiting ──admit──▶ prefilling ──▶ decoding ──▶ ending ──▶ (finished)
       ▲                   │             │           its last token is in flight: by length it can have no more rows
       └──────retract──────┴─────────────┘

A request that leaves a slot while a step in flight has a row of it is in `leaving` until that step's result is in; only
then are its slot and pages given up. A retracted one is in `waiting` and `leaving` at once, and cannot be admitted
before it has left. All containers keep their order: equal inputs give equal batches.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator
from typing import Literal

from vibe_sgl_lite.scheduler.batch import BatchBuilder, DecodeRows, Step
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.fairness import FairShares
from vibe_sgl_lite.scheduler.histogram import Histogram
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import NO_SLOT, Request
from vibe_sgl_lite.scheduler.sharing import PrefixLeaders
from vibe_sgl_lite.scheduler.tiers.disk import DiskTier, TierCounts
from vibe_sgl_lite.scheduler.tiers.host import HostTier

PauseMode = Literal["abort", "wait", "keep", "retract"]
MAX_RETRACTIONS = 3
MAX_LOSSES = 3  # rank groups that one request may be suspected of having killed


def _seq(request: Request) -> int:
    return request.seq


class WaitingQueue:
    """Requests without a slot, in order of arrival. A retracted request comes back to its old place."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.num_bytes = 0  # of their token ids

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        assert not request.queued
        request.queued = True
        self.num_bytes += len(request.tokens)
        insort(self._requests, request, key=_seq)

    def remove(self, request: Request) -> None:
        assert request.queued
        request.queued = False
        self.num_bytes -= len(request.tokens)
        index = bisect_left(self._requests, request.seq, key=_seq)
        assert self._requests[index] is request
        del self._requests[index]

    def snapshot(self) -> list[Request]:
        return list(self._requests)


class SchedulerState:
    """`requests`: every live sample by uid. `groups`: the live samples' uids of each client request. `ends`: the tokens
    that may end live samples, and how many.

    epoch: the number of the rank group that runs the steps, or, unless `has_ranks`, of the one to come.
    pause: how running requests are treated while no others begin; None while there is none.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory = KVMemory(config.num_pages, config.page_size)
        self.epoch = config.epoch
        self.has_ranks = True
        self.tier: DiskTier | None = None
        self.host: HostTier | None = None
        self.tier_counts = TierCounts()
        self.pause: PauseMode | None = None
        self.weight_version = config.weight_version
        self.builder = BatchBuilder(config.epoch)
        self.leaders = PrefixLeaders(config.page_size)
        self.shares = FairShares()
        self.requests: dict[int, Request] = {}
        self.groups: dict[int, list[int]] = {}
        self.ends = Counter[int]()
        self.waiting = WaitingQueue()
        self.prefilling: dict[int, Request] = {}
        self.decoding = DecodeRows()
        self.ending: dict[int, Request] = {}
        self.leaving: dict[int, Request] = {}
        self._suspects: list[Request] = []
        self.free_slots = list(range(config.max_running_requests))
        self.in_flight: deque[Step] = deque()
        self.next_step = 0
        self.completed_step = -1
        self.num_arrived = 0
        self.num_released = 0
        self.num_retractions = 0
        self.num_prompt_tokens = 0  # of requests that got a slot, each counted once
        self.num_cached_tokens = 0  # of these, found in the cache
        self.num_resumed = 0  # requests that went on with what they had, after a loss of ranks or of a process
        self.queue_ms = Histogram()  # from a request's arrival until it first got a slot

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and go on."""
        return len(self.prefilling) + len(self.decoding) + len(self.ending)

    @property
    def memory_is_coming(self) -> bool:
        """Pages will come back with the results of the steps in flight."""
        return bool(self.leaving or self.ending or self.memory.num_deferred)

    def enqueue(self, request: Request) -> None:
        """A new sample."""
        if not self.config.radix_cache:
            request.uses_cache = request.sampling.n > 1
            request.cache_salt = f"request {request.group}"
        self.num_arrived += 1
        self.num_resumed += request.num_generated > 0
        self.requests[request.uid] = request
        self.groups.setdefault(request.group, []).append(request.uid)
        self.ends.update(request.ends)
        self.shares.enter(request)
        self.waiting.add(request)

    def admit(self, request: Request, now: float) -> None:
        """Give a slot to a waiting request whose cached prefix is attached."""
        assert request.slot == NO_SLOT
        assert not request.finished
        self.waiting.remove(request)
        request.slot = heapq.heappop(self.free_slots)
        request.prefill_end = request.num_tokens
        if request.cached_tokens < 0:
            self.shares.admitted(request)
            self.queue_ms.observe(round((now - request.arrival) * 1000))
            request.cached_tokens = request.num_computed_tokens
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += request.cached_tokens
        self.prefilling[request.uid] = request
        self.builder.take_slot(request)
        self.leaders.begin(request)
        if self.tier is not None:
            self.tier.used_by(request)
        request.page_keys = None
        if request.guaranteed:
            self.memory.reserve(request)

    def open_host(self, host: HostTier) -> None:
        """Ranks that have run nothing yet work with it."""
        self.host = host
        self.memory.cache.watchers.append(host)

    def open_tier(self, tier: DiskTier) -> None:
        """Ranks that have run nothing yet work with it, unless its root stands for other weights than theirs."""
        if not self.tier_counts.closed:
            self.tier = tier
            self.memory.cache.watchers.append(tier)

    def retract(self, request: Request) -> None:
        """Take the slot and pages of a running request; it waits again and resumes with all it has generated."""
        assert not request.guaranteed
        request.retractions += 1
        request.guaranteed = request.retractions >= MAX_RETRACTIONS
        self.num_retractions += 1
        self._leave(request)
        self.waiting.add(request)

    def requeue(self, request: Request) -> None:
        """Take the slot and pages of a running request for another reason than want of memory."""
        self._leave(request)
        self.waiting.add(request)

    def change_weights(self, version: str, *, flush: bool) -> None:
        """Between steps: what begins from now on shares no page with what came before. Requests that decode keep their
        KV, those that have yielded nothing yet begin anew. flush: give back what is cached; else it is kept for the day
        when the weights of its version come back."""
        assert not self.in_flight
        assert self.tier is None is self.host, "its pages belong to the weights before"
        for request in list(self.prefilling.values()):
            self.requeue(request)
        for request in self.decoding:
            request.tainted = True
        self.memory.cache.park(None if flush else self.weight_version)
        if not flush:
            self.memory.cache.unpark(version)
        self.weight_version = version

    def finish(self, request: Request) -> None:
        """The sample's terminal event is out (or another process sends it): forget it, and free what it holds."""
        assert not request.finished
        request.finished = True
        del self.requests[request.uid]
        group = self.groups[request.group]
        group.remove(request.uid)
        if not group:
            del self.groups[request.group]
        for token in request.ends:
            self.ends[token] -= 1
            if not self.ends[token]:
                del self.ends[token]
        if request.queued:
            self.waiting.remove(request)
        elif request.uid not in self.leaving:
            self._leave(request)
        self.shares.leave(request)
        self._forget_private_prefix(request)

    def step_done(self, step: Step) -> None:
        """The result of `step` has been applied: let go of what only it still used."""
        self.memory.step_done(step.number)
        if self.leaving:
            for request in [r for r in self.leaving.values() if r.last_step <= step.number]:
                del self.leaving[request.uid]
                self._release(request)

    def reject_drafts(self, request: Request, count: int) -> None:
        """So many tokens of its oldest row in flight do not count: drafts, or the one of a row that yielded nothing."""
        request.num_computed_tokens -= count
        if request.uid not in self.leaving:
            self.memory.shrink(request)
            if self.ending.pop(request.uid, None) is not None:
                self.decoding.add(request)

    def lose_ranks(self, epoch: int) -> list[Request]:
        """Everything that runs waits again, with its tokens; steps in flight, pages and cache are gone.

        Returns the requests that `MAX_LOSSES` groups in a row have been lost with, without a token in between. Who was
        there at one loss less runs next, one at a time and with no newcomer beside it, so that the next loss tells the
        guilty from those that only ran beside them.
        """
        holders = [*self.prefilling.values(), *self.decoding, *self.ending.values(), *self.leaving.values()]
        for request in holders:
            if request.last_step > self.completed_step and not request.finished:
                gained = request.num_tokens > request.tokens_at_loss
                request.losses = 1 if gained else request.losses + 1
                request.tokens_at_loss = request.num_tokens
        for watcher in (self.tier, self.host):
            if watcher is not None:
                self.memory.cache.watchers.remove(watcher)
        self.tier = self.host = None
        self.memory.lose(holders)
        for place in (self.prefilling, self.decoding, self.ending, self.leaving):
            place.clear()
        for request in holders:
            self._wait_anew(request)
            if not request.finished and not request.queued:
                self.waiting.add(request)
                self.num_resumed += 1
        self.free_slots = list(range(self.config.max_running_requests))
        self.in_flight.clear()
        self.completed_step = self.next_step - 1
        self.num_released += 1
        self.leaders = PrefixLeaders(self.config.page_size)
        self.epoch, self.has_ranks = epoch, False
        self.builder = BatchBuilder(epoch)
        suspects = sorted((r for r in self.requests.values() if r.losses >= MAX_LOSSES - 1), key=lambda r: r.seq)
        self._suspects = [r for r in suspects if r.losses < MAX_LOSSES]
        return [r for r in suspects if r.losses >= MAX_LOSSES]

    def suspect(self) -> Request | None:
        """The next, or the one that runs, of those that may have killed ranks; one that gains a token is cleared."""
        while self._suspects:
            request = self._suspects[0]
            if not request.finished and request.num_tokens == request.tokens_at_loss:
                return request
            del self._suspects[0]
        return None

    def _leave(self, request: Request) -> None:
        if self.prefilling.pop(request.uid, None) is None and self.ending.pop(request.uid, None) is None:
            self.decoding.remove(request)
        self.leaders.end(request)
        self.memory.unreserve(request)
        self.shares.charge(request, request.num_tokens - request.prefill_end)
        if request.last_step > self.completed_step:
            self.leaving[request.uid] = request
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.num_released += 1
        self.memory.detach(request)
        self.builder.release_slot(request)
        heapq.heappush(self.free_slots, request.slot)
        self._wait_anew(request)
        self._forget_private_prefix(request)

    @staticmethod
    def _wait_anew(request: Request) -> None:
        request.slot = NO_SLOT
        request.prefill_end = request.num_tokens
        request.cached_version = -1
        request.tainted = False

    def _forget_private_prefix(self, request: Request) -> None:
        """Without the radix cache, only the samples of one request share; nothing of it stays after them."""
        if not self.config.radix_cache and request.uses_cache and request.group not in self.groups:
            self.memory.cache.drop(request.cache_salt)
