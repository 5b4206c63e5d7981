"""Sessions take turns by tokens; deadlines; a queue that is bounded in bytes."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.messages import AddRequest, StepResult, pack_ids
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.policies import POLICIES


def of(session: str, uid: int, tokens: int, *, priority: int = 0, **fields: Any) -> AddRequest:
    rng = random.Random(uid)
    message = request(uid, [rng.randrange(50) for _ in range(tokens)], priority=priority, **fields)
    return msgspec.structs.replace(message, session=session)


def ending_order(h: Harness) -> list[int]:
    """Serve all; the uids in the order in which their first tokens came."""
    order: list[int] = []
    while h.step():
        order += [uid for uid, sample in h.samples.items() if sample.tokens and uid not in order]
    h.check()
    h.check_all_ended()
    return order


@pytest.mark.parametrize("policy", POLICIES)
def test_many_long_prompts_of_one_session_do_not_hold_up_another(policy: str) -> None:
    h = Harness(config(num_pages=2000, policy=policy, chunked_prefill_size=32))
    for uid in range(40):
        h.add(of("a", uid, 400, max_new_tokens=1))
    for _ in range(6):
        h.step()
    h.add(of("b", 100, 20, max_new_tokens=1))
    steps = 0
    while not h.samples[100].tokens:
        h.step()
        steps += 1
    assert steps <= 4, "not before the long prompt that runs is done"
    h.run(checked=False)


def test_without_fairness_arrival_decides() -> None:
    h = Harness(config(num_pages=2000, chunked_prefill_size=32, fairness=False))
    for uid in range(6):
        h.add(of("a", uid, 100, max_new_tokens=1))
    h.add(of("b", 100, 20, max_new_tokens=1))
    assert ending_order(h) == [0, 1, 2, 3, 4, 5, 100]


def test_turns_are_by_tokens_not_by_requests() -> None:
    """One session's prompts are four times as long: the other gets four of its own for each."""
    h = Harness(config(num_pages=2000, chunked_prefill_size=20, max_running_requests=1, overlap=False))
    for uid in range(8):
        h.add(of("long", uid, 80, max_new_tokens=1))
    for uid in range(100, 132):
        h.add(of("short", uid, 20, max_new_tokens=1))
    order = ending_order(h)
    for served in range(5, 40, 5):
        longs = sum(uid < 100 for uid in order[:served])
        assert abs(longs - served / 5) <= 1, order


def test_what_a_session_generates_counts() -> None:
    """Equal prompts, but one session's answers are nine times as long."""
    h = Harness(config(num_pages=2000, max_running_requests=1, overlap=False))
    for uid in range(10):
        h.add(of("wordy", uid, 10, max_new_tokens=90))
        h.add(of("brief", 100 + uid, 10, max_new_tokens=10))
    order = ending_order(h)
    assert sum(uid < 100 for uid in order[:12]) in (2, 3), order


def test_nobody_saves_up_while_idle() -> None:
    h = Harness(config(num_pages=2000, max_running_requests=1, overlap=False, chunked_prefill_size=64))
    for uid in range(20):
        h.add(of("a", uid, 50, max_new_tokens=1))
    while len(h.live()) > 10:
        h.step()
    for uid in range(100, 110):
        h.add(of("b", uid, 50, max_new_tokens=1))
    late = [uid >= 100 for uid in ending_order(h) if uid >= 100 or uid >= 10]
    assert abs(sum(late[:10]) - 5) <= 1, late


def test_a_higher_priority_goes_before_any_turn() -> None:
    h = Harness(config(policy="priority", max_running_requests=1, overlap=False))
    h.add(of("a", 0, 10, priority=1, max_new_tokens=1))
    h.add(of("a", 1, 10, priority=1, max_new_tokens=1))
    h.add(of("b", 2, 10, priority=0, max_new_tokens=1))
    h.add(of("b", 3, 10, priority=1, max_new_tokens=1))
    assert ending_order(h) == [0, 3, 1, 2]


@pytest.mark.parametrize("fairness", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_session_is_served_as_without_fairness(policy: str, fairness: bool) -> None:
    def decisions(session: str) -> list[bytes]:
        scheduler = Scheduler(config(policy=policy, fairness=fairness, num_pages=40, conservativeness=0.1))
        rng = random.Random(1)
        batches = []
        for uid in range(60):
            scheduler.add(of(session, uid, rng.randrange(1, 60), max_new_tokens=rng.randrange(1, 60)), uid * 0.1)
            batch = scheduler.schedule(uid * 0.1)
            step = scheduler.oldest_step
            if batch is not None:
                batches.append(msgspec.msgpack.encode(batch))
            if step is not None and rng.random() < 0.8:
                ids = [7] * len(step.decode) + [7 if chunk.samples else -1 for chunk in step.chunks]
                scheduler.complete(StepResult(step.number, pack_ids(ids)), uid * 0.1)
        return batches

    assert decisions("") == decisions("somebody")


def test_sessions_are_forgotten() -> None:
    h = Harness(config())
    for uid in range(30):
        h.add(of(f"session {uid}", uid, 5, max_new_tokens=2))
        h.step()
    h.abort(29)
    h.run()
    assert not h.scheduler.state.shares._live
    assert not h.scheduler.state.shares._charged


# ----------------------------------------------------------------------------------------------------------- deadlines


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    h = Harness(config(max_running_requests=2))
    for uid, timeout_s in ((1, 5.0), (2, None), (3, 4.0), (4, 100.0)):
        message = request(uid, [uid] * 9, max_new_tokens=200)
        h.add(msgspec.structs.replace(message, timeout_s=timeout_s))
    for _ in range(3):
        h.step()
    assert h.scheduler.next_deadline == 4.0
    h.expire(3.9)
    assert len(h.live()) == 4
    h.expire(4.0)
    assert h.live() == [1, 2, 4]
    h.expire(60.0)
    assert h.live() == [2, 4]
    h.check()
    for uid in (1, 3):
        finish = h.samples[uid].finish
        assert finish is not None
        assert finish.error is not None
        assert finish.error.code == "deadline"
    assert h.samples[1].tokens
    h.run()
    assert h.scheduler.next_deadline == 100.0  # that of a request which is done: it will mean nothing
    h.expire(100.0)
    assert h.scheduler.next_deadline == float("inf")


def test_deadlines_of_the_done_are_forgotten() -> None:
    h = Harness(config())
    for uid in range(1000):
        h.add(msgspec.structs.replace(request(uid, [1, 2], max_new_tokens=1), timeout_s=1e6))
        h.run(checked=False)
    assert len(h.scheduler._deadlines) < 200


# --------------------------------------------------------------------------------------------------------------- bytes


def test_the_queue_is_bounded_in_bytes() -> None:
    h = Harness(config(num_pages=10_000, max_queued_bytes=4 * 1000))
    assert h.add(request(1, [1] * 600, max_new_tokens=1))
    assert not h.add(request(2, [1] * 401, max_new_tokens=1))
    assert h.rejected[2].error.code == "overloaded"
    assert not h.add(request(3, [1] * 201, max_new_tokens=1, n=2))
    assert h.add(request(5, [1] * 200, max_new_tokens=1, n=2))
    h.schedule()  # what runs does not count
    assert h.add(request(8, [1] * 600, max_new_tokens=1))
    h.run()
    assert h.scheduler.state.waiting.num_bytes == 0
