"""Too little memory, too many requests: refusals at arrival, retraction, and that everything still finishes."""

from __future__ import annotations

import random

import msgspec
import pytest

from tests.scheduler.fake_rank import VOCAB
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.scheduler.admission import NewTokenRatio
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.state import MAX_RETRACTIONS


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("radix_cache", [False, True])
@pytest.mark.parametrize("conservativeness", [0.0, 1.0])
def test_pages_for_two_of_sixteen(overlap: bool, radix_cache: bool, conservativeness: float) -> None:
    rng = random.Random(1)
    h = Harness(
        config(
            num_pages=20, page_size=4, max_running_requests=16, overlap=overlap, radix_cache=radix_cache,
            conservativeness=conservativeness,
        )
    )  # fmt: skip
    for uid in range(16):
        h.add(request(uid, [rng.randrange(VOCAB) for _ in range(16)], max_new_tokens=25))
    requests: list[Request] = list(h.scheduler.state.requests.values())
    h.run()
    assert all(sample.finish is not None and sample.finish.reason == "length" for sample in h.samples.values())
    assert max(r.retractions for r in requests) <= MAX_RETRACTIONS
    assert h.scheduler.stats()["num_retractions"] or conservativeness


@pytest.mark.parametrize("overlap", [False, True])
def test_after_three_retractions_the_whole_need_is_reserved(overlap: bool) -> None:
    h = Harness(config(num_pages=20, page_size=4, overlap=overlap, conservativeness=0.0, chunked_prefill_size=64))
    h.add(request(0, [1] * 8, max_new_tokens=40))
    unlucky = h.scheduler.state.requests[0]
    state = h.scheduler.state
    for _ in range(MAX_RETRACTIONS):
        while not (0 in state.decoding.uids or 0 in state.prefilling):
            h.step()
        state.retract(unlucky)
    assert unlucky.guaranteed
    for uid in range(1, 5):
        h.add(request(uid, [uid] * 8, max_new_tokens=40))
    while not (0 in state.decoding.uids or 0 in state.prefilling):
        h.step()
    memory = state.memory
    assert len(unlucky.pages) + unlucky.reserved_pages == 12  # 8 + 39 tokens of KV
    while h.samples[0].finish is None:
        h.step()
        h.check()
        assert memory.spare >= 0 or h.results
    h.run()
    assert unlucky.retractions == MAX_RETRACTIONS
    assert state.num_retractions > MAX_RETRACTIONS, "the others were retracted in its place"
    assert memory.reserved == 0


def test_the_victim_has_the_fewest_tokens_then_the_longest_prompt() -> None:
    h = Harness(config(overlap=False, num_pages=64, chunked_prefill_size=64))
    h.add(request(1, [1] * 8, max_new_tokens=40))
    h.step()
    h.step()
    h.add(request(2, [2] * 4, max_new_tokens=40))
    h.add(request(3, [3] * 9, max_new_tokens=40))
    h.step()
    h.scheduler._planner._retract_one()
    waiting = [r.uid for r in h.scheduler.state.waiting]
    assert waiting == [3]
    h.scheduler._planner._retract_one()
    assert [r.uid for r in h.scheduler.state.waiting] == [2, 3]
    h.run()


def test_what_can_never_fit_is_refused_at_arrival() -> None:
    h = Harness(config(num_pages=4, page_size=4))
    assert h.add(request(1, [1] * 9, max_new_tokens=8))  # the 17th token is never fed back: 16 tokens of KV
    assert not h.add(request(2, [1] * 9, max_new_tokens=9))
    error = h.rejected[2].error
    assert error.code == "kv_exhausted"
    assert "5 KV pages" in error.message
    assert "has 4" in error.message
    h.run()


def test_the_queue_has_a_limit() -> None:
    h = Harness(config(max_running_requests=2, max_queued_requests=3))
    accepted = [h.add(request(uid, [uid % VOCAB] * 4, max_new_tokens=2)) for uid in range(10)]
    assert accepted == [True] * 5 + [False] * 5  # two find a slot, three wait
    assert h.rejected[9].error.code == "overloaded"
    newcomer = msgspec.structs.replace(request(50, [1], max_new_tokens=2), session="another")
    assert h.add(newcomer)  # it finds room in a queue that another session has filled
    assert not h.add(msgspec.structs.replace(newcomer, uid=51))
    h.run()
    assert h.add(request(99, [1], max_new_tokens=2))
    h.run()


def test_the_ratio_falls_and_jumps() -> None:
    ratio = NewTokenRatio(1.0)
    assert ratio.value == pytest.approx(0.7)
    for _ in range(300):
        ratio.decode_step()
    assert ratio.value == pytest.approx(0.7 * 0.57)
    for _ in range(300):
        assert ratio.value > 0.7 * 0.14
        ratio.decode_step()
    assert ratio.value == pytest.approx(0.7 * 0.14)
    ratio.decode_step()
    assert ratio.value == pytest.approx(0.7 * 0.14)
    ratio.retracted([])
    assert ratio.value == pytest.approx(0.7)


def test_no_room_is_kept_for_what_comes_after_4096_tokens() -> None:
    """0.7 of 4096 tokens are 717 pages: five such requests fit. Of 0.7 of all their 16,000, one would."""
    h = Harness(config(num_pages=4096, page_size=4, overlap=False))
    for uid in range(8):
        h.add(request(uid, [uid] * 8, max_new_tokens=16_000))
    for _ in range(8):
        h.step()
    assert h.scheduler.state.num_running == 5


def test_cached_pages_make_room_before_anybody_is_retracted() -> None:
    h = Harness(config(num_pages=16, page_size=4))
    for uid in range(12):
        h.add(request(uid, [uid] * 20, max_new_tokens=20))
        h.run()
    stats = h.scheduler.stats()
    assert stats["num_retractions"] == 0
    assert int(stats["kv_pages_cached"]) > 8
