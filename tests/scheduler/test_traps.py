"""The places where a scheduler with two steps in flight goes wrong, one by one."""

from __future__ import annotations

import pytest

from tests.scheduler.fake_rank import reference
from tests.scheduler.harness import Harness, config, request, sampling
from vibe_sgl_lite.runtime.messages import RowLogprobs, StepResult, TokenLogprob, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.cost import decode_work


def finish_of(h: Harness, uid: int) -> tuple[str, int | str | None]:
    finish = h.samples[uid].finish
    assert finish is not None
    return finish.reason, finish.matched


def test_an_end_token_found_late_costs_one_row_and_no_token() -> None:
    end = reference([1, 2, 3], sampling(max_new_tokens=9))[4]
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=9, end_token_ids=(end,)))
    h.run()
    assert finish_of(h, 1) == ("stop", end)
    tokens = h.samples[1].tokens
    assert tokens.index(end) == len(tokens) - 1
    assert h.rank.tokens_run == 3 + len(tokens)  # one row more than needed: the last token was fed back in vain


@pytest.mark.parametrize(("ahead_s", "measured_s", "steps"), [(0.0, 0.001, 2), (0.003, 0.001, 3), (0.003, 0.01, 2)])
def test_a_third_step_is_sent_while_two_are_short(ahead_s: float, measured_s: float, steps: int) -> None:
    h = Harness(config(ahead_s=ahead_s))
    h.scheduler.cost.observe(decode_work(1, 4), measured_s)
    end = reference([1, 2, 3], sampling(max_new_tokens=9))[4]
    h.add(request(1, [1, 2, 3], max_new_tokens=9, end_token_ids=(end,)))
    while h.schedule():
        pass
    assert h.scheduler.stats()["steps_in_flight"] == steps
    h.run()
    assert finish_of(h, 1) == ("stop", end)
    assert h.rank.tokens_run == 3 + len(h.samples[1].tokens) + steps - 2


@pytest.mark.parametrize("ahead_s", [0.0, 1.0])
def test_the_length_is_known_ahead_and_costs_no_row(ahead_s: float) -> None:
    h = Harness(config(ahead_s=ahead_s))
    h.add(request(1, [1, 2, 3], max_new_tokens=5))
    h.run()
    assert finish_of(h, 1) == ("length", None)
    assert h.rank.tokens_run == 3 + 4


def test_one_new_token_needs_one_step() -> None:
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=1))
    h.run()
    assert h.scheduler.stats()["steps_total"] == 1
    assert len(h.samples[1].tokens) == 1


def test_slot_and_pages_stay_until_the_step_in_flight_is_done() -> None:
    h = Harness(config(max_running_requests=1, num_pages=4, radix_cache=False))
    h.add(request(1, [1] * 5, max_new_tokens=9))
    h.add(request(2, [2] * 5, max_new_tokens=9))
    h.schedule()
    h.schedule()
    h.abort(1)
    assert finish_of(h, 1)[0] == "abort"
    stats = h.scheduler.stats
    assert (stats()["num_running"], stats()["kv_pages_free"]) == (0, 2)
    h.complete()
    assert not h.schedule(), "the slot is not free yet"
    h.complete()
    assert stats()["kv_pages_free"] == 4
    assert h.schedule()
    assert h.rank.row_uids[2] == [2]
    h.run()


def test_a_slot_is_taken_in_the_batch_that_releases_it() -> None:
    h = Harness(config(max_running_requests=1, overlap=False))
    h.add(request(1, [1] * 5, max_new_tokens=1))
    h.add(request(2, [2] * 5, max_new_tokens=1))
    h.schedule()
    h.complete()
    batch = h.scheduler.schedule(1.0)
    assert batch is not None
    assert unpack_ids(batch.released) == [0]
    assert [new.slot for new in batch.new] == [0]
    h.results.append(h.rank.run(batch))
    h.run()


def test_an_abort_between_two_chunks() -> None:
    h = Harness(config(chunked_prefill_size=8))
    h.add(request(1, list(range(40)), max_new_tokens=3))
    h.schedule()
    h.schedule()
    h.complete()
    h.abort(1)
    h.run()
    assert h.samples[1].tokens == []
    assert h.scheduler.stats()["kv_pages_cached"] == 4  # both chunks that ran


def test_a_stop_string_and_the_length_at_once() -> None:
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=2))
    h.run()
    h.scheduler.stop_matched(1, h.now)  # the detokenizer's message crossed the last output
    h.scheduler.abort(1, h.now)
    assert finish_of(h, 1) == ("length", None)
    assert h.scheduler.idle


@pytest.mark.parametrize("overlap", [False, True])
def test_a_retracted_request_keeps_the_token_in_flight(overlap: bool) -> None:
    h = Harness(config(overlap=overlap))
    h.add(request(1, [1, 2, 3], max_new_tokens=12))
    for _ in range(4):
        h.step()
    h.schedule()
    h.scheduler.state.retract(h.scheduler.state.requests[1])
    before = len(h.samples[1].tokens)
    assert not h.schedule(), "it must wait for its token"
    while h.complete():
        pass
    assert len(h.samples[1].tokens) > before
    h.run()
    assert finish_of(h, 1) == ("length", None)


def test_an_end_token_in_flight_ends_a_retracted_request() -> None:
    end = reference([1, 2, 3], sampling(max_new_tokens=9))[3]
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=9, end_token_ids=(end,)))
    while len(h.samples[1].tokens) < len(reference([1, 2, 3], sampling(max_new_tokens=9, end_token_ids=(end,)))) - 1:
        h.schedule()
        h.complete()
    h.schedule()
    h.scheduler.state.retract(h.scheduler.state.requests[1])
    h.run()
    assert finish_of(h, 1) == ("stop", end)
    assert h.scheduler.stats()["num_waiting"] == 0


def test_a_page_only_where_a_row_begins_one() -> None:
    h = Harness(config(overlap=False, page_size=4))
    h.add(request(1, [1] * 6, max_new_tokens=12))
    pages = []
    for number in range(12):
        batch = h.scheduler.schedule(float(number))
        assert batch is not None
        pages.append(len(unpack_ids(batch.page_ids)))
        assert (batch.row_slots is None) == (number >= 2), "unchanged rows are left out"
        h.results.append(h.rank.run(batch))
        h.complete()
    # 6 prompt tokens fill 1.5 pages; positions 8, 12 and 16 begin new ones
    assert pages == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_numerical_error_hits_its_request_alone() -> None:
    h = Harness(config(chunked_prefill_size=64), poison=99)
    h.add(request(1, [1, 2, 3, 4] * 3, max_new_tokens=6))
    h.add(request(2, [5] * 9 + [99] + [5] * 6, max_new_tokens=6))
    h.add(request(3, [7, 8, 9], max_new_tokens=6))
    h.run()
    assert [finish_of(h, uid)[0] for uid in (1, 2, 3)] == ["length", "error", "length"]
    finish = h.samples[2].finish
    assert finish is not None
    assert finish.error is not None
    assert finish.error.code == "numerical_error"
    # nothing of the failed row is cached: only request 1's four full pages and request 3's two
    assert h.scheduler.stats()["kv_pages_cached"] == 16 // 4 + 8 // 4


def test_an_earlier_chunk_of_a_failed_request_stays_cached() -> None:
    h = Harness(config(chunked_prefill_size=8, overlap=False), poison=99)
    h.add(request(1, [5] * 12 + [99], max_new_tokens=6))
    h.run()
    assert finish_of(h, 1)[0] == "error"
    assert h.scheduler.stats()["kv_pages_cached"] == 2


def test_flush_is_refused_while_anything_is_there() -> None:
    h = Harness(config())
    h.add(request(1, [1] * 20, max_new_tokens=3))
    assert h.scheduler.flush_cache(0.0) is None
    h.schedule()
    h.abort(1)
    assert h.scheduler.flush_cache(0.0) is None, "a step is in flight"
    h.run()
    assert h.scheduler.flush_cache(0.0) == 4  # the first chunk, 16 tokens
    assert h.scheduler.stats()["kv_pages_free"] == 64


def test_samples_share_the_prompt_and_differ_by_seed() -> None:
    for radix_cache in (True, False):
        h = Harness(config(radix_cache=radix_cache, chunked_prefill_size=64))
        h.add(request(10, list(range(30)), max_new_tokens=4, n=3, seed=2**64 - 1))
        h.run()
        seeds = [reference(list(range(30)), sampling(max_new_tokens=4, seed=s)) for s in (2**64 - 1, 0, 1)]
        if radix_cache:
            assert [h.samples[10 + i].tokens for i in range(3)] == seeds
        # the prompt once, then the partial last page and the new tokens of each sample
        assert h.rank.tokens_run == 30 + 2 * 2 + 3 * 3
        assert [h.samples[10 + i].cached_tokens for i in range(3)] == [0, 28, 28]
        assert h.scheduler.stats()["kv_pages_free"] == (64 if not radix_cache else 64 - 7 - 3)
        assert h.scheduler.state.memory.cache.num_roots == (1 if radix_cache else 0)


def test_an_abort_ends_every_sample() -> None:
    h = Harness(config(max_running_requests=2))
    h.add(request(10, [1] * 30, max_new_tokens=40, n=3))
    for _ in range(4):
        h.step()
    h.abort(11)  # not a request's own number: unknown
    assert len(h.live()) == 3
    h.abort(10)
    assert not h.live()
    h.run()


def test_logprobs_go_with_their_tokens() -> None:
    scheduler = Scheduler(config(overlap=False, chunked_prefill_size=4))
    params: ResolvedSampling = sampling(max_new_tokens=2, logprobs=True, prompt_logprobs=True)
    message = request(1, [1, 2, 3, 4, 5, 6])
    scheduler.add(type(message)(1, "r", message.token_ids, params), 0.0)

    def entry(token: int) -> TokenLogprob:
        return TokenLogprob(token, -float(token))

    assert scheduler.schedule(0.0) is not None
    rows = [RowLogprobs(0, (), 1, (entry(2), entry(3), entry(4)))]
    assert not scheduler.complete(StepResult(0, pack_ids([-1]), logprobs=rows), 0.0)
    assert scheduler.schedule(0.0) is not None
    rows = [RowLogprobs(0, (entry(9),), 4, (entry(5), entry(6)))]
    (first,) = scheduler.complete(StepResult(1, pack_ids([9]), logprobs=rows), 0.0).tokens
    assert first.logprobs == (entry(9),)
    assert first.prompt_logprobs == (None, entry(2), entry(3), entry(4), entry(5), entry(6))
    assert scheduler.schedule(0.0) is not None
    (last,) = scheduler.complete(StepResult(2, pack_ids([8]), logprobs=[RowLogprobs(0, (entry(8),))]), 0.0).tokens
    assert last.logprobs == (entry(8),)
    assert last.prompt_logprobs is None
