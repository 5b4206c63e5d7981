"""Ranks that die, and rows that yield several tokens or fewer than they ran."""

from __future__ import annotations

import random

import pytest

from tests.scheduler.fake_rank import reference
from tests.scheduler.harness import Harness, check_pages, config, request, sampling
from vibe_sgl_lite.runtime.messages import RowLogprobs, StepResult, TokenLogprob, pack_ids, unpack_ids
from vibe_sgl_lite.scheduler.core import Scheduler


def reason_of(h: Harness, uid: int) -> str | None:
    finish = h.samples[uid].finish
    return None if finish is None else finish.error.code if finish.error is not None else finish.reason


def test_everything_that_runs_waits_again_with_its_tokens() -> None:
    h = Harness(config(chunked_prefill_size=64))
    h.add(request(1, list(range(20)), max_new_tokens=9))
    h.add(request(2, list(range(20)), max_new_tokens=9, prompt_logprobs=True))
    for _ in range(4):
        h.step()
    before = [len(h.samples[uid].tokens) for uid in (1, 2)]
    assert min(before) >= 2
    h.schedule()
    h.lose_ranks()
    check_pages(h.scheduler)
    stats = h.scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["steps_in_flight"]) == (0, 2, 0)
    assert (stats["kv_pages_free"], stats["kv_pages_cached"]) == (64, 0)
    assert stats["ranks_ready"] is False
    assert not h.schedule(), "no ranks are there"
    h.ranks_ready()
    assert h.scheduler.stats()["ranks_ready"] is True
    batch = h.scheduler.schedule(h.now)
    assert batch is not None
    assert batch.epoch == 1
    assert [len(new.token_ids) // 4 for new in batch.new] == [20 + count for count in before]
    assert all((new.num_prompt_tokens, new.num_computed) == (20, 0) for new in batch.new)
    h.results.append(h.rank.run(batch))
    h.run()
    assert [reason_of(h, uid) for uid in (1, 2)] == ["length", "length"]


def test_what_dead_ranks_answered_means_nothing() -> None:
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=9))
    h.schedule()
    h.schedule()
    h.lose_ranks()
    h.ranks_ready()
    late = list(h.results)
    h.results.clear()
    assert len(late) == 2
    h.schedule()
    steps = h.scheduler.stats()["steps_in_flight"]
    for result in late:
        assert not h.scheduler.complete(result, h.now)
    assert h.scheduler.stats()["steps_in_flight"] == steps
    h.run()
    assert reason_of(h, 1) == "length"


def test_a_request_that_no_longer_fits_is_ended() -> None:
    h = Harness(config(num_pages=16))
    h.add(request(1, [1] * 20, max_new_tokens=30))  # 13 pages
    h.add(request(2, [2] * 20, max_new_tokens=9))  # 7 pages
    h.step()
    h.lose_ranks()
    h.ranks_ready(num_pages=12)
    assert reason_of(h, 1) == "kv_exhausted"
    h.add(request(3, [1] * 20, max_new_tokens=30))
    assert h.rejected[3].error.code == "kv_exhausted"
    h.run()
    assert reason_of(h, 2) == "length"
    assert h.scheduler.stats()["kv_pages_total"] == 12


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "priority"])
@pytest.mark.parametrize("guilty", [0, 7, 19])
@pytest.mark.parametrize("kills_at", [0, 1, 5])
def test_one_that_kills_the_ranks_ends_and_takes_nobody_with_it(policy: str, guilty: int, kills_at: int) -> None:
    """Whenever a step holds it with so many tokens generated, the ranks die. 20 prompts share the first steps."""
    rng = random.Random(guilty)
    h = Harness(config(policy=policy, num_pages=200, chunked_prefill_size=40))
    for uid in range(20):
        h.add(request(uid, [rng.randrange(50) for _ in range(rng.randrange(1, 60))], max_new_tokens=12))
    deaths = 0
    while not h.scheduler.idle:
        sent = h.schedule()
        if sent and guilty in h.rank.row_uids[h.results[-1].step] and len(h.samples[guilty].tokens) >= kills_at:
            deaths += 1
            h.lose_ranks()
            h.ranks_ready()
        elif not sent:
            h.complete()
        h.check()
    assert reason_of(h, guilty) == "poison"
    assert deaths == 3
    assert {reason_of(h, uid) for uid in range(20) if uid != guilty} == {"length"}
    h.check_all_ended()


def test_the_suspected_run_one_at_a_time() -> None:
    h = Harness(config(num_pages=200, chunked_prefill_size=100))
    for uid in range(3):
        h.add(request(uid, [uid] * 10, max_new_tokens=20))
    for _ in range(2):
        h.schedule()
        h.lose_ranks()
        h.ranks_ready()
    h.add(request(9, [9] * 10, max_new_tokens=20))
    h.schedule()
    assert h.rank.row_uids[h.results[-1].step] == [0]
    h.lose_ranks()  # its third in a row
    assert reason_of(h, 0) == "poison"
    h.ranks_ready()
    seen: list[list[int]] = []
    for _ in range(4):
        h.schedule()
        seen.append(h.rank.row_uids[h.results[-1].step])
        while h.complete():
            pass
    assert seen == [[1], [1, 2], [1, 2, 9], [1, 2, 9]]  # each is cleared by its first token
    h.run()
    assert [reason_of(h, uid) for uid in (1, 2, 9)] == ["length"] * 3


def test_a_loss_after_new_tokens_does_not_add_up() -> None:
    h = Harness(config())
    h.add(request(1, [1] * 10, max_new_tokens=30))
    for _ in range(6):
        h.step()
        h.schedule()
        h.lose_ranks()
        h.results.clear()
        h.ranks_ready()
    assert h.scheduler.state.requests[1].losses == 1
    h.run()
    assert reason_of(h, 1) == "length"


# -------------------------------------------------------------------------------------------------------------- drafts


def answer(scheduler: Scheduler, step: int, rows: list[list[int]], **fields: object) -> StepResult:
    tokens = [token for row in rows for token in row]
    return StepResult(step, pack_ids(tokens), counts=pack_ids(len(row) for row in rows), **fields)  # type: ignore[arg-type]


def test_rows_are_planned_for_the_most_and_pages_come_back() -> None:
    scheduler = Scheduler(config(page_size=2, draft_tokens=5, num_pages=40, base_tokens=1000))
    scheduler.add(request(1, [1, 2, 3], max_new_tokens=30), 0.0)
    held, rows = [], []
    for expected in (3, 6):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        assert unpack_ids(batch.row_tokens or b"") == [expected]
        held.append(scheduler.state.requests[1].num_computed_tokens)
    assert held == [3, 9]
    assert scheduler.stats()["kv_pages_free"] == 40 - 5
    scheduler.complete(answer(scheduler, 0, [[7]]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert batch.row_tokens is None, "the same again"
    assert scheduler.stats()["kv_pages_free"] == 40 - 8  # 3 + 6 + 6 tokens
    outputs = scheduler.complete(answer(scheduler, 1, [[8, 9]]), 0.0)  # 1 of 5 drafts held
    assert [unpack_ids(output.token_ids) for output in outputs.tokens] == [[8, 9]]
    assert scheduler.state.requests[1].num_computed_tokens == 3 + 2 + 6
    assert scheduler.stats()["kv_pages_free"] == 40 - 6
    rows = [unpack_ids(output.token_ids) for output in scheduler.complete(answer(scheduler, 2, [[4] * 6]), 0.0).tokens]
    assert rows == [[4] * 6]
    check_pages(scheduler)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_never_runs_past_its_limit(overlap: bool) -> None:
    h = Harness(config(draft_tokens=7, overlap=overlap))
    h.add(request(1, [1, 2, 3], max_new_tokens=10))
    while h.schedule() or h.complete():
        request_ = h.scheduler.state.requests.get(1)
        assert request_ is None or request_.num_computed_tokens <= 12
        h.check()
    h.run()
    assert reason_of(h, 1) == "length"
    assert h.samples[1].tokens == reference([1, 2, 3], sampling(max_new_tokens=10))


def test_tokens_behind_an_end_are_dropped_with_their_logprobs() -> None:
    scheduler = Scheduler(config(draft_tokens=3, overlap=False))
    scheduler.add(request(1, [1, 2, 3], max_new_tokens=20, end_token_ids=(6,), logprobs=True), 0.0)
    scheduler.schedule(0.0)
    scheduler.complete(StepResult(0, pack_ids([7])), 0.0)
    scheduler.schedule(0.0)
    entries = tuple(TokenLogprob(token, -1.0) for token in (5, 6, 4, 4))
    result = answer(scheduler, 1, [[5, 6, 4, 4]], logprobs=[RowLogprobs(0, entries)])
    (output,) = scheduler.complete(result, 0.0).tokens
    assert unpack_ids(output.token_ids) == [5, 6]
    assert output.logprobs == entries[:2]
    assert output.finish is not None
    assert (output.finish.reason, output.finish.matched) == ("stop", 6)
    assert output.usage is not None
    assert output.usage.completion_tokens == 3


def test_drafts_give_way_when_pages_are_short() -> None:
    h = Harness(config(page_size=1, num_pages=12, draft_tokens=4, overlap=False))
    h.add(request(1, [1, 2], max_new_tokens=6))
    h.add(request(2, [3, 4], max_new_tokens=6))
    h.step()
    planned = []
    while h.schedule():
        planned.append(h.rank.rows[1] if h.rank.rows is not None else [])
        h.complete()
    h.run()
    assert [1, 1] in planned, planned
    assert [reason_of(h, uid) for uid in (1, 2)] == ["length", "length"]
