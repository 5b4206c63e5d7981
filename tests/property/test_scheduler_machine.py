"""The whole scheduler under random use, against a rank that notices every wrong page and a reference that knows the
tokens. After every rule the page equation must hold, and every cached page must hold what the tree says; at the end
every sample has had exactly one terminal event and its own tokens, and every page is free or cached.

What must be cached is checked against a plain set of prefixes: nothing but full pages that some sample has computed,
and all of these unless pages had to be evicted.

SCHEDULER_EXAMPLES and SCHEDULER_RULES make longer runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.scheduler.harness import VOCAB, Harness, config, request
from vibe_sgl_lite.runtime.messages import unpack_ids
from vibe_sgl_lite.scheduler.batch import BatchBuilder
from vibe_sgl_lite.scheduler.page_allocator import PageAllocator
from vibe_sgl_lite.scheduler.policies import POLICIES
from vibe_sgl_lite.scheduler.radix_cache import RadixCache
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.results import ResultApplier
from vibe_sgl_lite.scheduler.state import SchedulerState

EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", "1000"))
RULES = int(os.environ.get("SCHEDULER_RULES", "50"))
POISON = VOCAB + 1

# Prompts are made of these pieces, so that prefixes meet and part in the middle of pages.
PIECES = ([1, 2, 3, 4, 5], [1, 2, 3, 9], [7] * 16, list(range(40)), [8], [POISON])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 4, 16, 64]),
        tokens=st.integers(90, 600),
        slots=st.integers(1, 6),
        chunk=st.sampled_from([1, 7, 16, 64]),
        policy=st.sampled_from(sorted(POLICIES)),
        overlap=st.booleans(),
        radix_cache=st.sampled_from([True, True, True, False]),
    )
    def begin(
        self, page_size: int, tokens: int, slots: int, chunk: int, policy: str, overlap: bool, radix_cache: bool
    ) -> None:
        self.harness = Harness(
            config(
                page_size=page_size,
                num_pages=max(2, tokens // page_size),
                max_running_requests=slots,
                max_queued_requests=8,
                chunked_prefill_size=chunk,
                policy=policy,
                overlap=overlap,
                radix_cache=radix_cache,
            ),
            poison=POISON,
        )
        self.uid = 0

    @rule(
        pieces=st.lists(st.sampled_from(range(len(PIECES) - 1)), min_size=1, max_size=5),
        poisoned=st.sampled_from([False] * 9 + [True]),
        salt=st.sampled_from(["", "", "a"]),
        new=st.integers(1, 40),
        end=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(0, 2),
        prompt_logprobs=st.sampled_from([False] * 7 + [True]),
    )
    def add(
        self,
        pieces: list[int],
        poisoned: bool,
        salt: str,
        new: int,
        end: list[int],
        n: int,
        priority: int,
        prompt_logprobs: bool,
    ) -> None:
        prompt = [token for piece in pieces for token in PIECES[piece]] + (PIECES[-1] if poisoned else [])
        message = request(
            self.uid, prompt, salt=salt, priority=priority, max_new_tokens=new, n=n, seed=self.uid % 3,
            end_token_ids=tuple(end), prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        accepted = self.harness.add(message)
        fits = -(-(len(prompt) + new - 1) // self.harness.config.page_size) <= self.harness.config.num_pages
        if not fits:
            assert self.harness.rejected[self.uid].error.code == "kv_exhausted"
        elif not accepted:
            assert self.harness.rejected[self.uid].error.code == "overloaded"
        self.uid += n

    @rule()
    def schedule(self) -> None:
        self.harness.schedule()

    @rule()
    def complete(self) -> None:
        self.harness.complete()

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.harness.now += seconds

    @precondition(lambda self: self.uid)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.integers(0, self.uid - 1)))

    @precondition(lambda self: self.uid and self.harness.live())
    @rule(data=st.data())
    def stop_string(self, data: st.DataObject) -> None:
        self.harness.stop_matched(data.draw(st.sampled_from(self.harness.live())))

    @precondition(lambda self: self.uid)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        state = self.harness.scheduler.state
        running = [*state.decoding.values(), *state.prefilling.values()]
        candidates = [r for r in running if not r.guaranteed]
        if candidates:
            state.retract(data.draw(st.sampled_from(candidates)))

    @rule(count=st.integers(1, 40))
    def evict(self, count: int) -> None:
        self.harness.scheduler.state.memory.cache.evict(count)

    @rule()
    def flush(self) -> None:
        scheduler = self.harness.scheduler
        freed = scheduler.flush_cache()
        assert (freed is None) == bool(self.harness.live() or self.harness.results)
        if freed is not None:
            assert scheduler.stats()["kv_pages_free"] == scheduler.config.num_pages

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.harness.run(checked=False)
        self.harness.check()
        stats = self.harness.scheduler.stats()
        assert int(stats["kv_pages_free"]) + int(stats["kv_pages_evictable"]) == self.harness.config.num_pages
        for sample in self.harness.samples.values():
            poisoned = POISON in unpack_ids(sample.message.token_ids)
            reason = sample.finish.reason if sample.finish is not None else None
            assert (reason == "error") <= poisoned
            if poisoned:
                assert reason in ("error", "abort", None)
                assert not sample.tokens


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=RULES,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


# ---------------------------------------------------------------------------------- the machine finds planted bugs


class Planted:
    """A method of which every nth call, counted anew for each scheduler, does something else."""

    def __init__(self, owner: type, name: str, n: int, instead: Callable[..., Any]) -> None:
        self.owner, self.name, self.n, self.instead = owner, name, n, instead
        self.calls = 0

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        method, begin = getattr(self.owner, self.name), SchedulerState.__init__

        def broken(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return (self.instead if self.calls % self.n == 0 else method)(*args, **kwargs)

        def counted_anew(state: SchedulerState, *args: Any) -> None:
            self.calls = 0
            begin(state, *args)

        monkeypatch.setattr(self.owner, self.name, broken)
        monkeypatch.setattr(SchedulerState, "__init__", counted_anew)


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def lose_the_last_output(applier: ResultApplier, request: Request, *rest: Any) -> None:
    applier._state.finish(request)


def leave_at_once(state: SchedulerState, request: Request) -> None:
    for place in (state.decoding, state.prefilling, state.ending):
        place.pop(request.uid, None)
    state.leaders.end(request)
    state.memory.unreserve(request)
    state._release(request)


PLANTED = {
    "a free is skipped": Planted(PageAllocator, "free", 5, nothing),
    "a lock is dropped": Planted(RadixCache, "lock", 5, nothing),
    "an unlock is dropped": Planted(RadixCache, "unlock", 5, nothing),
    "a terminal event is lost": Planted(ResultApplier, "_finish", 3, lose_the_last_output),
    "a slot is not released": Planted(SchedulerState, "_release", 3, nothing),
    "pages are free before their step is done": Planted(SchedulerState, "_leave", 1, leave_at_once),
    "the ranks do not learn of a page": Planted(BatchBuilder, "add_page_each", 3, nothing),
    "a failed row enters the cache": Planted(ResultApplier, "_fail", 1, lambda applier, r, *rest: None),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug].plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, ExceptionGroup)):
        run_state_machine_as_test(
            SchedulerMachine,
            settings=settings(
                max_examples=300,
                stateful_step_count=50,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
