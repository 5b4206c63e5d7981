"""Rows that yield nothing because a grammar's mask was late: they go on in the next step, as if nothing had been."""

from __future__ import annotations

import pytest

from tests.scheduler.harness import Harness, check_cache_contents, config, request


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("late", [0.2, 0.9])
def test_tokens_are_those_without(overlap: bool, late: float) -> None:
    """Also of the first token, with which the prompt's logprobs go and the text is opened."""
    for seed in range(20):
        h = Harness(config(overlap=overlap, num_pages=40), seed=seed, late=late)
        for uid in range(6):
            assert h.add(request(uid, [uid % 3] * (3 + uid), max_new_tokens=9, prompt_logprobs=uid % 2 == 0))
        h.run()
        check_cache_contents(h.scheduler, h.rank)
        assert {sample.finish.reason for sample in h.samples.values() if sample.finish} == {"length"}
        assert all(len(sample.tokens) == 9 for sample in h.samples.values())
