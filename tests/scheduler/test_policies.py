"""Who is next: order, aging, preemption, sharing inside a batch, chunks beside running rows."""

from __future__ import annotations

import itertools

import pytest

from tests.scheduler.fake_rank import VOCAB
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.scheduler.policies import POLICIES, make_policy


def order_of(h: Harness) -> list[int]:
    """The waiting requests in the policy's order."""
    state = h.scheduler.state
    return [r.uid for r in make_policy(h.config.policy).order(state.waiting.snapshot(), state.memory, h.now)]


def warm(h: Harness, *prefixes: list[int]) -> None:
    """Put prefixes into the cache."""
    for number, prefix in enumerate(prefixes):
        h.add(request(1000 + number, [*prefix, 0], max_new_tokens=1))
    h.run()


LONG, SHORT = [1] * 40, [2] * 16


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fcfs", [1, 2, 3, 4, 5]),
        ("lpm", [5, 2, 3, 1, 4]),
        ("dfs-weight", [2, 3, 5, 1, 4]),
        ("priority", [4, 1, 2, 3, 5]),
    ],
)
def test_the_order_of_each_policy(policy: str, expected: list[int]) -> None:
    h = Harness(config(policy=policy, num_pages=200))
    warm(h, LONG, SHORT)
    h.add(request(1, [3] * 20))
    h.add(request(2, SHORT + [5] * 3))
    h.add(request(3, SHORT + [6] * 3))
    h.add(request(4, [4] * 20, priority=1))
    h.add(request(5, LONG + [5] * 3))
    assert order_of(h) == expected


def test_lpm_gives_up_with_a_long_queue() -> None:
    h = Harness(config(policy="lpm", num_pages=200, max_queued_requests=1000))
    warm(h, LONG)
    for uid in range(128):
        h.add(request(uid, [3, 4, 5]))
    h.add(request(500, [*LONG, 9]))
    assert order_of(h)[:2] == [0, 1]
    h.abort(0)
    assert order_of(h)[0] == 500


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="schedule_policy='sjf' is unknown"):
        make_policy("sjf")


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_starves_a_request(policy: str) -> None:
    """One request that the policy likes least, and a never-ending stream of ones that it likes best."""
    h = Harness(config(policy=policy, num_pages=200, max_running_requests=1, chunked_prefill_size=64))
    warm(h, LONG)
    uids = itertools.count(1, 2)
    for _ in range(3):
        h.add(request(next(uids), [*LONG, 3], max_new_tokens=2, priority=5))
    h.add(request(0, [4] * 10, max_new_tokens=2))
    for turn in range(400):
        h.now += 1.0
        if len(h.scheduler.state.waiting) < 4:
            h.add(request(next(uids), [*LONG, turn % VOCAB], max_new_tokens=2, priority=5))
        h.step()
        if h.samples[0].finish is not None:
            break
    else:
        raise AssertionError("it starves")
    h.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scarce", ["slots", "pages"])
def test_a_higher_priority_takes_the_place_of_a_lower(overlap: bool, scarce: str) -> None:
    slots, pages = (1, 64) if scarce == "slots" else (4, 12)
    h = Harness(config(policy="priority", max_running_requests=slots, num_pages=pages, overlap=overlap))
    h.add(request(1, [1] * 8, max_new_tokens=30))
    h.add(request(2, [2] * 8, max_new_tokens=30))
    for _ in range(6):
        h.step()
    h.add(request(3, [3] * 30, max_new_tokens=6, priority=1))
    for _ in range(20):
        h.step()
        h.check()
    third = h.samples[3].finish
    assert third is not None
    assert h.samples[2].finish is None
    assert h.scheduler.stats()["num_retractions"]
    h.run()


def test_equals_do_not_push_each_other_aside() -> None:
    h = Harness(config(policy="priority", max_running_requests=1))
    h.add(request(1, [1] * 8, max_new_tokens=30, priority=2))
    h.step()
    h.add(request(2, [2] * 8, max_new_tokens=3, priority=2))
    h.now += 1e6
    h.run()
    assert h.scheduler.stats()["num_retractions"] == 0


def test_one_of_several_computes_a_common_prefix() -> None:
    prefix = list(range(40))
    h = Harness(config(num_pages=200, chunked_prefill_size=256, page_size=4))
    for uid in range(6):
        h.add(request(uid, [*prefix, 41 + uid], max_new_tokens=3))
    h.add(request(9, [7] * 10, max_new_tokens=3))
    h.schedule()
    assert h.rank.row_uids[0] == [0, 9], "the others wait for the first; whoever shares nothing does not"
    h.run()
    # the prefix once, then a token and two steps each
    assert h.rank.tokens_run == 41 + 2 + 5 * (1 + 2) + 10 + 2
    assert [h.samples[uid].cached_tokens for uid in range(6)] == [0] + [40] * 5


def test_a_short_common_prefix_is_not_waited_for() -> None:
    h = Harness(config(num_pages=200, chunked_prefill_size=256, page_size=4))
    for uid in range(3):
        h.add(request(uid, [*range(30), 41 + uid], max_new_tokens=3))
    h.schedule()
    assert h.rank.row_uids[0] == [0, 1, 2]
    h.run()


def test_different_salts_never_share() -> None:
    h = Harness(config(num_pages=200, chunked_prefill_size=256))
    for uid, salt in enumerate(["", "a", "b", "a"]):
        h.add(request(uid, list(range(41)), salt=salt, max_new_tokens=3))
    h.run()
    assert [h.samples[uid].cached_tokens for uid in range(4)] == [0, 0, 0, 40]


def test_nobody_waits_for_a_prefix_that_will_not_come() -> None:
    h = Harness(config(num_pages=200, chunked_prefill_size=16))
    for uid in range(3):
        h.add(request(uid, [*range(48), uid], max_new_tokens=3))
    h.schedule()
    h.abort(0)
    h.run()
    # the second began when the first was gone; the third waited while 32 tokens or more were to come
    assert [h.samples[uid].cached_tokens for uid in (1, 2)] == [0, 32]
