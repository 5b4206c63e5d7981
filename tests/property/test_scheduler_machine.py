"""The whole scheduler under random use, against a rank that notices every wrong page and a reference that knows the
tokens. After every rule the page equation must hold, and every cached page must hold what the tree says; at the end
every sample has had exactly one terminal event and its own tokens, and every page is free or cached.

What must be cached is checked against a plain set of prefixes: nothing but full pages that some sample has computed,
and all of these unless pages had to be evicted.

SCHEDULER_EXAMPLES and SCHEDULER_RULES make longer runs.
"""

from __future__ import annotations

import os
import random

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.scheduler.fake_folder import FakeFolder
from tests.scheduler.fake_rank import VOCAB, reference
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.messages import AddRequest, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling
from vibe_sgl_lite.scheduler.policies import POLICIES
from vibe_sgl_lite.scheduler.state import PauseMode

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
        ahead_s=st.sampled_from([0.0, 1e9]),
        radix_cache=st.sampled_from([True, True, True, False]),
        draft_tokens=st.sampled_from([0, 0, 1, 4]),
        fairness=st.booleans(),
        late=st.sampled_from([0, 0, 0.3]),
        folder_pages=st.sampled_from([0, 0, 1, 5, 30, 1000]),
        folder_ranks=st.sampled_from([1, 2]),
        folder_fails=st.sampled_from([0, 0, 0.2]),
        seed=st.integers(0, 2**32),
    )
    def begin(
        self,
        page_size: int,
        tokens: int,
        slots: int,
        chunk: int,
        policy: str,
        overlap: bool,
        ahead_s: float,
        radix_cache: bool,
        draft_tokens: int,
        fairness: bool,
        late: float,
        folder_pages: int,
        folder_ranks: int,
        folder_fails: float,
        seed: int,
    ) -> None:
        folder = None
        if folder_pages and radix_cache:
            folder = FakeFolder(random.Random(seed), folder_pages, folder_ranks, folder_fails)
        self.harness = Harness(
            config(
                page_size=page_size,
                num_pages=max(2, tokens // page_size),
                max_running_requests=slots,
                max_queued_requests=8,
                chunked_prefill_size=chunk,
                policy=policy,
                overlap=overlap,
                ahead_s=ahead_s,
                radix_cache=radix_cache,
                draft_tokens=draft_tokens,
                fairness=fairness,
            ),
            poison=POISON,
            seed=seed,
            late=late,
            folder=folder,
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
        session=st.sampled_from(["", "", "a", "b"]),
        timeout_s=st.sampled_from([None] * 6 + [1.0, 60.0]),
        resumed=st.sampled_from([None] * 4 + [0, 1, 5]),
        pooled=st.sampled_from([False] * 3 + [True]),
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
        session: str,
        timeout_s: float | None,
        resumed: int | None,
        pooled: bool,
    ) -> None:
        prompt = [token for piece in pieces for token in PIECES[piece]] + (PIECES[-1] if poisoned else [])
        pooling = Pooling(8) if pooled else None
        if pooled:
            new, n, prompt_logprobs, resumed = 1, 1, False, None
        message = request(
            self.uid, prompt, salt=salt, priority=priority, max_new_tokens=new, n=n, seed=self.uid % 3,
            end_token_ids=tuple(end), prompt_logprobs=prompt_logprobs, pooling=pooling,
        )  # fmt: skip
        message = msgspec.structs.replace(message, session=session, timeout_s=timeout_s)
        if resumed is not None and not poisoned:
            message = msgspec.structs.replace(message, resume_ids=self.what_a_client_has(message, resumed))
        accepted = self.harness.add(message)
        fits = -(-(len(prompt) + new - 1) // self.harness.config.page_size) <= self.num_pages
        if not fits:
            assert self.harness.rejected[self.uid].error.code == "kv_exhausted"
        elif not accepted:
            assert self.harness.rejected[self.uid].error.code == "overloaded"
        self.uid += n

    def what_a_client_has(self, message: AddRequest, count: int) -> list[bytes | None]:
        """The first `count` tokens of each sample; None for one that has ended by then, unless all have."""
        salt = message.cache_salt if self.harness.config.radix_cache else f"request {message.uid}"
        prompt, resumed = unpack_ids(message.token_ids), []
        for index in range(message.sampling.n):
            tokens = reference(prompt, message.sampling, salt, index)
            resumed.append(pack_ids(tokens[:count]) if count < len(tokens) else None)
        return resumed if any(ids is not None for ids in resumed) else [b""] * message.sampling.n

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
        self.harness.expire(self.harness.now + seconds)

    @precondition(lambda self: self.harness.folder is not None)
    @rule(count=st.integers(1, 5))
    def answers(self, count: int) -> None:
        for _ in range(count):
            self.harness.answer()

    @precondition(lambda self: self.harness.folder is not None)
    @rule()
    def files_are_lost(self) -> None:
        assert self.harness.folder is not None
        self.harness.folder.lose_some()

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
        running = [*state.decoding, *state.prefilling.values()]
        candidates = [r for r in running if not r.guaranteed]
        if candidates:
            state.retract(data.draw(st.sampled_from(candidates)))

    @rule(
        ready=st.sampled_from([True, True, False]),
        more=st.sampled_from([0, 0, 0, -1, 3]),
        again=st.lists(st.integers(0, 4), max_size=3),
    )
    def lose_ranks(self, ready: bool, more: int, again: list[int]) -> None:
        """At any moment, and again after some steps; the next ones may need a while to come, and have other memory."""
        self.harness.lose_ranks()
        for steps in again:
            if not self.harness.scheduler.state.has_ranks:
                self.harness.ranks_ready()
            for _ in range(steps):
                self.harness.step()
            self.harness.schedule()
            self.harness.lose_ranks()
        if ready:
            self.ranks_ready(more)

    @precondition(lambda self: not self.harness.scheduler.state.has_ranks)
    @rule(more=st.sampled_from([0, 0, 0, -1, 3]))
    def ranks_ready(self, more: int) -> None:
        self.harness.ranks_ready(max(1, self.num_pages + more))

    @rule(mode=st.sampled_from(["abort", "wait", "wait", "keep", "retract"]))
    def pause(self, mode: PauseMode) -> None:
        self.harness._take(self.harness.scheduler.pause(mode, self.harness.now))

    @precondition(lambda self: self.harness.scheduler.state.pause)
    @rule()
    def resume(self) -> None:
        self.harness.scheduler.resume(self.harness.now)

    @property
    def num_pages(self) -> int:
        return self.harness.scheduler.state.memory.num_pages

    @rule(count=st.integers(1, 40))
    def evict(self, count: int) -> None:
        self.harness.scheduler.state.memory.cache.evict(count)

    @rule()
    def flush(self) -> None:
        scheduler = self.harness.scheduler
        freed = scheduler.flush_cache(0.0)
        loading = scheduler.state.memory.num_loading
        unused = scheduler.quiet and not scheduler.state.num_running
        assert (freed is None) == bool((self.harness.live() and not unused) or self.harness.due() or loading)
        if freed is not None:
            assert scheduler.stats()["kv_pages_free"] == self.num_pages
            assert scheduler.stats()["disk_pages"] == 0

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.harness.scheduler.resume(self.harness.now)
        self.harness.run(checked=False)
        self.harness.check()
        stats = self.harness.scheduler.stats()
        assert int(stats["kv_pages_free"]) + int(stats["kv_pages_evictable"]) == self.num_pages
        for sample in self.harness.samples.values():
            poisoned = POISON in unpack_ids(sample.message.token_ids)
            error = sample.finish.error if sample.finish is not None else None
            if error is not None and error.code == "numerical_error":
                assert poisoned
            elif error is not None:
                assert (error.code == "poison") == (sample.losses >= 3)
                assert error.code in ("poison", "kv_exhausted", "deadline")
                assert error.code != "deadline" or sample.message.timeout_s is not None
            elif poisoned:
                assert sample.finish is None or sample.finish.reason == "abort"
            assert not (poisoned and sample.tokens)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=RULES,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
