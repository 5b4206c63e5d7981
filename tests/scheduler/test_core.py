"""The scheduler core against a fake rank: outputs, ends, batching, pressure."""

from __future__ import annotations

import random

import msgspec
import pytest

from tests.scheduler.fake_rank import VOCAB, reference
from tests.scheduler.harness import Harness, check_pages, config, random_prompt, request
from vibe_sgl_lite.runtime.messages import RowAttributes, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("radix_cache", [False, True])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("pages", [24, 200, 2000])
def test_random_load_gives_every_request_its_own_tokens(
    overlap: bool, radix_cache: bool, page_size: int, pages: int
) -> None:
    rng = random.Random(pages * 100 + page_size)
    num_pages = max(6, pages * 4 // page_size)
    h = Harness(config(num_pages=num_pages, page_size=page_size, overlap=overlap, radix_cache=radix_cache))
    prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] for _ in range(4)]
    uid = 0
    for _ in range(60):
        prompt = random_prompt(rng, rng.randrange(1, 50), prefixes)
        n = rng.choice([1, 1, 1, 3])
        h.add(
            request(
                uid,
                prompt,
                salt=rng.choice(["", "", "b"]),
                max_new_tokens=rng.randrange(1, 30),
                end_token_ids=(rng.randrange(VOCAB),) if rng.random() < 0.5 else (),
                seed=rng.randrange(3),
                n=n,
            )
        )
        uid += n
        for _ in range(rng.randrange(4)):
            h.step()
            check_pages(h.scheduler, h.rank)
        if rng.random() < 0.1:
            h.abort(rng.randrange(uid))
            check_pages(h.scheduler, h.rank)
        if rng.random() < 0.1 and h.live():
            h.stop_matched(rng.choice(h.live()))
            check_pages(h.scheduler, h.rank)
    h.run()
    stats = h.scheduler.stats()
    assert int(stats["kv_pages_free"]) + int(stats["kv_pages_cached"]) == num_pages
    assert stats["kv_pages_cached"] == stats["kv_pages_evictable"]
    assert bool(stats["evicted_pages_total"]) == (pages < 2000) or not radix_cache
    if not radix_cache:
        assert stats["kv_pages_cached"] == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pages", [16, 200])
def test_requests_that_come_with_what_they_have_go_on_from_there(overlap: bool, pages: int) -> None:
    """Any number of tokens of any sample, under pressure too; those that have ended are not run again."""
    rng = random.Random(pages)
    h = Harness(config(num_pages=pages, overlap=overlap))
    for uid in range(0, 200, 4):
        n = rng.choice([1, 1, 4])
        message = request(
            uid,
            random_prompt(rng, rng.randrange(1, 20)),
            max_new_tokens=rng.randrange(1, 30),
            stop_token_ids=(rng.randrange(VOCAB),),
            seed=rng.randrange(3),
            n=n,
        )
        resume: list[bytes | None] = []
        for index in range(n):
            tokens = reference(unpack_ids(message.token_ids), message.sampling, "", index)
            resume.append(pack_ids(tokens[: rng.randrange(len(tokens))]) if index == 0 or rng.random() < 0.7 else None)
        h.add(msgspec.structs.replace(message, resume_ids=resume))
        for _ in range(rng.randrange(3)):
            h.step()
            check_pages(h.scheduler, h.rank)
    h.run()
    assert len(h.samples) > 50
    assert {sample.finish.reason for sample in h.samples.values() if sample.finish} == {"stop", "length"}
    h.check_all_ended()
    assert bool(h.scheduler.stats()["num_retractions"]) == (pages == 16)


def test_the_detokenizer_gets_to_know_what_the_client_has() -> None:
    h = Harness(config())
    message = request(1, [1, 2, 3], max_new_tokens=5)
    have = reference([1, 2, 3], message.sampling)[:2]
    h.scheduler.add(msgspec.structs.replace(message, resume_ids=[pack_ids(have)]), 0.0)
    [opened] = h.scheduler.abort(1, 0.0).opens
    assert opened.resume_ids == pack_ids(have)
    assert opened.prompt_tokens == 3


def test_one_request_alone() -> None:
    h = Harness(config())
    h.add(request(1, [1, 2, 3], max_new_tokens=5))
    h.run()
    assert h.samples[1].finish is not None
    assert h.samples[1].finish.reason == "length"
    assert unpack_ids(h.samples[1].message.token_ids) == [1, 2, 3]


def test_attributes_reach_the_ranks_and_part_the_cache() -> None:
    """Left out for plain rows; and what one adapter has computed is never another's prefix."""
    h = Harness(config())
    plain = request(1, [5] * 12, max_new_tokens=1)
    seen = []
    for uid, attributes in ((1, None), (2, RowAttributes(adapter=3)), (3, RowAttributes(adapter=4)), (4, None)):
        h.add(msgspec.structs.replace(plain, uid=uid, attributes=attributes))
        batch = h.scheduler.schedule(0.0)
        assert batch is not None
        seen.append((batch.new[0].attributes, batch.new[0].num_computed))
        h.results.append(h.rank.run(batch))
        h.run()
    assert seen == [(None, 0), (RowAttributes(adapter=3), 0), (RowAttributes(adapter=4), 0), (None, 8)]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_pooled_request_ends_with_its_prompt(overlap: bool) -> None:
    """In chunks, beside one that generates; it takes pages for its prompt alone, and finds a cached prefix."""
    h = Harness(config(overlap=overlap))
    prompt = [n % VOCAB for n in range(41)]
    h.add(request(1, [7, 8], max_new_tokens=12))
    h.add(request(2, prompt, pooling=Pooling(8)))
    h.run()
    assert h.rank.tokens_run <= 2 + 11 + 41 + 2 * overlap
    h.add(request(3, prompt, pooling=Pooling(8)))
    h.run()
    assert h.samples[3].pooled == h.samples[2].pooled
    assert [h.samples[uid].cached_tokens for uid in (2, 3)] == [0, 40]
    assert h.scheduler.stats()["kv_pages_cached"] == 10 + (2 + 11) // 4
    assert h.scheduler.stats()["completion_tokens_total"] == 12


def test_pooled_requests_are_aborted_and_survive_their_ranks() -> None:
    h = Harness(config(chunked_prefill_size=4))
    for uid in range(1, 4):
        h.add(request(uid, [uid] * 20, pooling=Pooling(8)))
    for _ in range(3):
        h.step()
    h.abort(2)
    h.lose_ranks()
    h.run()
    finish = [h.samples[uid].finish for uid in (1, 2, 3)]
    assert [one.reason for one in finish if one is not None] == ["stop", "abort", "stop"]
    with_all_pages = Harness(config(num_pages=5))
    assert with_all_pages.add(request(1, [1] * 20, pooling=Pooling(8)))
    assert not with_all_pages.add(request(2, [1] * 21, pooling=Pooling(8)))
    with_all_pages.run()
