"""Pauses, sleep and new weights in the core: who ends, who waits, who goes on, and that no cached page is shared
between weights."""

from __future__ import annotations

import pytest

from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.scheduler.state import PauseMode

SHARED = list(range(40))


def running(**fields: object) -> Harness:
    """Two requests that decode, one in the middle of its prompt, one that has not begun."""
    harness = Harness(config(max_running_requests=3, chunked_prefill_size=8, num_pages=200, **fields))
    for uid in (0, 1):
        harness.add(request(uid, [uid + 1] * 5, max_new_tokens=30))
    while len(harness.samples[1].tokens) < 3:
        harness.step()
    harness.add(request(2, [3] * 60, max_new_tokens=5))
    for _ in range(3):
        harness.step()
    harness.add(request(3, [4] * 5, max_new_tokens=5))
    assert harness.scheduler.state.prefilling
    assert len(harness.scheduler.state.decoding) == 2
    return harness


def pause(harness: Harness, mode: PauseMode) -> None:
    harness._take(harness.scheduler.pause(mode, harness.now))


def settle(harness: Harness) -> None:
    while harness.step():
        harness.check()
    assert harness.scheduler.quiet


@pytest.mark.parametrize("mode", ["keep", "retract", "wait", "abort"])
@pytest.mark.parametrize("overlap", [False, True])
def test_whoever_was_paused_gets_the_same_tokens(mode: PauseMode, overlap: bool) -> None:
    harness = running(overlap=overlap)
    pause(harness, mode)
    harness.add(request(4, [5] * 5, max_new_tokens=5))
    settle(harness)
    ended = [uid for uid, sample in harness.samples.items() if sample.finish is not None]
    state = harness.scheduler.state
    assert ended == {"keep": [], "retract": [], "wait": [0, 1, 2], "abort": [0, 1, 2, 3]}[mode]
    assert state.num_running == {"keep": 3, "retract": 0, "wait": 0, "abort": 0}[mode]
    assert not harness.samples[4].tokens
    assert harness.scheduler.stats()["paused"]
    harness.scheduler.resume(harness.now)
    harness.run()  # which compares every token
    assert harness.samples[4].finish is not None
    assert harness.samples[4].finish.reason == "length"


def test_a_retracted_request_comes_to_its_end_before_a_pause_has_come_about() -> None:
    harness = running()
    harness.scheduler.state.retract(next(iter(harness.scheduler.state.decoding)))
    pause(harness, "wait")
    settle(harness)
    assert [uid for uid, sample in harness.samples.items() if sample.finish is not None] == [0, 1, 2]


def test_deadlines_and_aborts_hold_during_a_pause() -> None:
    harness = running()
    message = request(4, [5] * 5, max_new_tokens=5)
    harness.add(type(message)(message.uid, message.rid, message.token_ids, message.sampling, timeout_s=10.0))
    pause(harness, "keep")
    settle(harness)
    harness.expire(harness.now + 20)
    harness.abort(0)
    assert harness.samples[4].finish is not None
    assert harness.samples[4].finish.error is not None
    assert harness.samples[4].finish.error.code == "deadline"
    assert harness.samples[0].finish is not None
    harness.scheduler.resume(harness.now)
    harness.run()


def test_the_cache_can_be_flushed_once_nobody_holds_it() -> None:
    harness = running()
    pause(harness, "keep")
    settle(harness)
    assert harness.scheduler.flush_cache(harness.now) is None
    pause(harness, "retract")
    assert harness.scheduler.flush_cache(harness.now) is not None
    harness.scheduler.resume(harness.now)
    assert harness.scheduler.flush_cache(harness.now) is None
    harness.run()


def test_who_sleeps_goes_on_with_a_new_pool() -> None:
    harness = running()
    pause(harness, "keep")
    settle(harness)
    harness.scheduler.sleep(harness.now)
    assert harness.scheduler.stats()["kv_pages_free"] == 200
    harness.scheduler.resume(harness.now)
    assert not harness.schedule()
    harness.rank = harness._new_rank(150, harness.rank.epoch)
    harness._take(harness.scheduler.ranks_ready(150, harness.now))
    harness.run()
    assert all(sample.losses == 0 for sample in harness.samples.values())


def finish(harness: Harness) -> None:
    """As `Harness.run`, which knows only one kind of weights in the cache."""
    while harness.step():
        harness.check()
    assert harness.scheduler.idle
    harness.check_all_ended()


def cached(harness: Harness, uid: int) -> int:
    harness.add(request(uid, SHARED, max_new_tokens=2))
    finish(harness)
    return harness.samples[uid].cached_tokens


def change(harness: Harness, version: str, *, flush: bool) -> None:
    pause(harness, "keep")
    settle(harness)
    harness.scheduler.change_weights(version, flush, harness.now)
    harness.scheduler.resume(harness.now)


def test_prefixes_of_other_weights_are_not_found() -> None:
    harness = Harness(config(num_pages=200))
    assert (cached(harness, 0), cached(harness, 1)) == (0, 36)
    change(harness, "b", flush=True)
    assert harness.scheduler.stats()["kv_pages_free"] == 200
    assert (cached(harness, 2), cached(harness, 3)) == (0, 36)
    change(harness, "c", flush=False)
    assert harness.scheduler.stats()["kv_pages_free"] != 200
    assert (cached(harness, 4), cached(harness, 5)) == (0, 36)
    change(harness, "b", flush=False)
    assert cached(harness, 6) == 36
    change(harness, "c", flush=True)
    assert cached(harness, 7) == 0
    change(harness, "b", flush=False)
    assert cached(harness, 8) == 0
    assert harness.scheduler.stats()["weight_version"] == "b"


@pytest.mark.parametrize("flush", [True, False])
def test_a_kept_request_leaves_nothing_in_the_cache(flush: bool) -> None:
    """Its KV is of two weights. What was computed before its prompt was whole begins anew."""
    harness = running()
    pause(harness, "keep")
    settle(harness)
    prompts = [r.uid for r in harness.scheduler.state.prefilling.values()]
    harness.scheduler.change_weights("b", flush, harness.now)
    assert prompts == [2]
    assert [r.uid for r in harness.scheduler.state.waiting] == [2, 3]
    harness.check()
    harness.scheduler.resume(harness.now)
    finish(harness)
    cache = harness.scheduler.state.memory.cache
    whole = request(9, [1] * 5 + harness.samples[0].tokens).token_ids
    assert cache.match_length("", whole, 35) == 0
    # What the old weights made of its prompt may be there, out of reach.
    assert all(cache.match_length(salt, whole, 35) <= 4 for salt in cache._roots)
    for uid in (2, 3):
        prompt = harness.samples[uid].message.token_ids
        assert cache.match_length("", prompt, 4) == 4


def test_a_kept_request_that_is_retracted_is_whole_again() -> None:
    harness = running()
    change(harness, "b", flush=True)
    request_of_0 = harness.scheduler.state.requests[0]
    assert request_of_0.tainted
    harness.step()
    harness.scheduler.state.retract(request_of_0)
    finish(harness)
    assert not request_of_0.tainted
    cache = harness.scheduler.state.memory.cache
    whole = request(9, [1] * 5 + harness.samples[0].tokens).token_ids
    assert cache.match_length("", whole, 35) == 32
