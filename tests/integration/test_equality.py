"""The same tokens whatever the scheduler does: caching, chunks, pages, overlap, retraction and batching change nothing.

In float32, where no rounding makes a token depend on what else is in the batch. The first engine, with a cold cache,
says what is right; that it is right in itself is known from the answers to the closed prompts. Every other engine
changes several settings at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from examples.tiny_model.prompts import answer_of, closed_answer_prompts, with_shared_prefix
from tests.integration.daemon import Daemon, model_flags, running
from vibe_sgl_lite import Client, Output, SamplingParams

FLOAT32 = ["--dtype", "float32"]
SMALLEST, NO_CACHE = "page 1, chunk 16, no overlap", "page 64, chunk 64, no cache"
VARIANTS = {
    SMALLEST: ["--page-size", "1", "--chunked-prefill-size", "16", "--disable-overlap"],
    NO_CACHE: ["--page-size", "64", "--chunked-prefill-size", "64", "--disable-radix-cache"],
}
SMALL_POOL = ["--page-size", "16", "--chunked-prefill-size", "64", "--max-total-tokens", "1200"]

QUESTIONS = with_shared_prefix(closed_answer_prompts(64, seed=4), stories=1, seed=4)
OPENINGS = [
    f"{a} {b}"
    for a, b in itertools.product(
        ("The little dog", "One day, Mia", "A tall tree", "小猫"), ("ran", "found", "saw a", "was", "and")
    )
]
ANSWER = SamplingParams(max_new_tokens=64, temperature=0)
LONG = SamplingParams(max_new_tokens=160, temperature=0, ignore_eos=True)


def sampled(index: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=40, temperature=1.0, top_k=-1, top_p=1.0, seed=1000 + index, ignore_eos=True
    )  # fmt: skip


class Tokens(NamedTuple):
    """What the engine generates for all three kinds of requests."""

    answers: list[list[int]]
    stories: list[list[int]]
    drawn: list[list[int]]


def ids(outputs: list[Output]) -> list[list[int]]:
    assert all(output.finish_reason in ("stop", "length") for output in outputs)
    return [list(output.token_ids) for output in outputs]


def answers(client: Client) -> list[Output]:
    """All questions in one batch."""
    return client.chat([question.messages for question in QUESTIONS], ANSWER, enable_thinking=False)


def everything(client: Client) -> Tokens:
    return Tokens(
        ids(answers(client)),
        ids(client.generate(OPENINGS, LONG)),
        ids(client.generate(OPENINGS, [sampled(index) for index in range(len(OPENINGS))])),
    )


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The engine that says what is right: defaults, pages of 16 tokens and chunks of 512."""
    with running(*FLOAT32) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def right(daemon: Daemon) -> Tokens:
    with daemon.client() as client:
        return everything(client)


def test_the_answers_are_right(daemon: Daemon, right: Tokens) -> None:
    with daemon.client() as client:
        client.flush_cache()
        cold = answers(client)
    assert ids(cold) == right.answers
    correct = [
        answer_of(output.text) == question.expected for question, output in zip(QUESTIONS, cold, strict=True)
    ]  # fmt: skip
    assert sum(correct) >= 0.95 * len(QUESTIONS)


def test_a_warm_cache_changes_nothing(daemon: Daemon, right: Tokens) -> None:
    with daemon.client() as client:
        warm = answers(client)
        assert ids(warm) == right.answers
        for output in warm:
            assert output.usage is not None
            assert output.usage.cached_tokens >= output.usage.prompt_tokens - 17, "all but the last page is cached"
        assert everything(client) == right


def test_one_at_a_time_changes_nothing(daemon: Daemon, right: Tokens) -> None:
    with daemon.client() as client:
        client.flush_cache()
        for index, question in enumerate(QUESTIONS[:14]):
            output = client.chat(question.messages, ANSWER, enable_thinking=False)
            assert list(output.token_ids) == right.answers[index]
        for index, opening in enumerate(OPENINGS[:4]):
            assert list(client.generate(opening, LONG).token_ids) == right.stories[index]
            assert list(client.generate(opening, sampled(index)).token_ids) == right.drawn[index]


@pytest.mark.parametrize("variant", [NO_CACHE, pytest.param(SMALLEST, marks=pytest.mark.slow)])
def test_other_settings_change_nothing(variant: str, right: Tokens) -> None:
    with running(*FLOAT32, *VARIANTS[variant]) as daemon, daemon.client() as client:
        assert everything(client) == right
        if "--disable-radix-cache" in VARIANTS[variant]:
            assert client.stats()["cached_tokens_total"] == 0
        else:
            assert int(client.stats()["cached_tokens_total"]) > 64 * 100, "they share the story"
            assert ids(answers(client)) == right.answers


def test_retraction_changes_nothing(right: Tokens) -> None:
    """A long stream takes most of the pool, and for so long that admission becomes trusting; then all others come."""
    with running(*FLOAT32, *SMALL_POOL) as daemon, daemon.client() as client:
        first = client.stream(OPENINGS[0], SamplingParams(max_new_tokens=800, temperature=0, ignore_eos=True))
        tokens: list[int] = []
        for chunk in first:
            tokens += chunk.token_ids
            if len(tokens) > 600:
                break
        assert ids(client.generate(OPENINGS, LONG)) == right.stories
        assert ids(answers(client)) == right.answers
        for chunk in first:
            tokens += chunk.token_ids
        assert len(tokens) == 800
        assert tokens[:160] == right.stories[0]
        stats = client.stats()
        assert int(stats["num_retractions"]) > len(OPENINGS) / 2
        assert int(stats["evicted_pages_total"]) > 50


# ---------------------------------------------------------------------------------- a model of real size

BIG_VARIANTS = {
    "page 1, chunk 16, no overlap": VARIANTS["page 1, chunk 16, no overlap"],
    "page 64, chunk 64, no cache": VARIANTS["page 64, chunk 64, no cache"],
    "a pool for a few": ["--page-size", "4", "--max-total-tokens", "300"],
}


@pytest.mark.slow
@pytest.mark.skipif("QWEN3_MODEL" not in os.environ, reason="QWEN3_MODEL names no model")
@pytest.mark.timeout(1800)
def test_the_same_on_a_model_of_real_size() -> None:
    """QWEN3_MODEL, with dummy weights where it has none: cold, warm, and every variant."""
    model = model_flags()["qwen3"]
    shared = [(7 * n + 11) % 1000 for n in range(100)]
    prompts = [shared + [(n * 31 + k) % 1000 for k in range(20)] for n in range(6)]
    greedy = SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
    drawn = [SamplingParams(max_new_tokens=8, temperature=1.0, seed=n, ignore_eos=True) for n in range(6)]

    def generate(client: Client) -> list[list[int]]:
        return ids(client.generate(prompts, greedy)) + ids(client.generate(prompts, drawn))

    with running(*model, *FLOAT32, "--max-total-tokens", "8192") as daemon, daemon.client() as client:
        cold = generate(client)
        assert generate(client) == cold
        assert int(client.stats()["cached_tokens_total"]) > 6 * 100
        assert list(client.generate(prompts[3], greedy).token_ids) == cold[3]
    for name, flags in BIG_VARIANTS.items():
        size = [] if "--max-total-tokens" in flags else ["--max-total-tokens", "8192"]
        with running(*model, *FLOAT32, *flags, *size) as daemon, daemon.client() as client:
            assert generate(client) == cold, name
            if not size:
                assert int(client.stats()["num_retractions"]) > 0
