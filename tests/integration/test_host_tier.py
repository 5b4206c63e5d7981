"""The prefix cache's tier in host memory through whole engines: no token depends on it.

In float32, where no rounding makes a token depend on what is in the batch or in the cache.
"""

from __future__ import annotations

import random

import pytest

from tests.integration.daemon import running
from vibe_sgl_lite import Client, Output, SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
FLAGS = ("--device", "cuda", "--dtype", "float32", "--max-running-requests", "8")


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(300, 900) for _ in range(rng.randrange(100, 400))] for _ in range(count)]


def cached(outputs: list[Output]) -> int:
    return sum(output.usage.cached_tokens for output in outputs if output.usage is not None)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [("--cuda-graph-max-bs", "4"), ("--speculative-algorithm", "ngram")])
def test_what_left_the_pool_comes_back(more: tuple[str, ...]) -> None:
    """Over a pool that holds a fifth of the prompts, one after the other and eight at a time, in other orders."""
    asked = prompts(40)
    with running(*FLAGS, *more) as daemon, daemon.client() as client:
        right = [list(output.token_ids) for output in client.generate(input_ids=asked, sampling_params=PARAMS)]
    small = (*FLAGS, *more, "--max-total-tokens", "2000", "--hicache-size", "0.5")
    with running(*small) as daemon, daemon.client() as client:
        rounds = [ask(client, asked, right, seed) for seed in range(4)]
        assert rounds[0] < sum(map(len, asked)) // 4
        assert all(found > sum(map(len, asked)) // 2 for found in rounds[1:])
        assert int(client.stats()["host_restored_tokens_total"]) > 0


def ask(client: Client, asked: list[list[int]], right: list[list[int]], seed: int) -> int:
    """Tokens that were cached."""
    order = random.Random(seed).sample(range(len(asked)), len(asked))
    if seed % 2:
        outputs = [client.generate(input_ids=asked[number], sampling_params=PARAMS) for number in order]
    else:
        outputs = client.generate(input_ids=[asked[number] for number in order], sampling_params=PARAMS)
    assert [list(output.token_ids) for output in outputs] == [right[number] for number in order]
    return cached(outputs)
