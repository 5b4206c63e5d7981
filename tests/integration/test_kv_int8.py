"""The KV cache in 8 bits through the whole pipeline: answers stay right, cold, warm, under pressure, on two ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from examples.tiny_model.prompts import answer_of, closed_answer_prompts, with_shared_prefix
from tests.integration.daemon import running
from vibe_sgl_lite import Client, Output, SamplingParams

INT8 = ["--kv-cache-dtype", "int8"]
QUESTIONS = with_shared_prefix(closed_answer_prompts(72, seed=9), stories=1, seed=9)
ANSWER = SamplingParams(max_new_tokens=64, temperature=0)
STORY = SamplingParams(max_new_tokens=120, temperature=1.0, seed=3, ignore_eos=True)


def answers(client: Client) -> list[Output]:
    """All questions in one batch."""
    return client.chat([question.messages for question in QUESTIONS], ANSWER, enable_thinking=False)


def num_right(outputs: Sequence[Output]) -> int:
    return sum(answer_of(out.text) == question.expected for out, question in zip(outputs, QUESTIONS, strict=True))


@pytest.fixture(scope="module")
def right_in_bfloat16() -> int:
    with running() as daemon, daemon.client() as client:
        return num_right(answers(client))


def test_answers_are_as_right_as_with_a_cache_in_bfloat16(right_in_bfloat16: int) -> None:
    with running(*INT8) as daemon, daemon.client() as client:
        outputs = answers(client)
        assert num_right(outputs) >= right_in_bfloat16 - 1
        assert num_right(outputs) >= 0.95 * len(QUESTIONS)
        samples = client.chat(
            QUESTIONS[0].messages, SamplingParams(max_new_tokens=8, n=3, seed=5), enable_thinking=False
        )
        assert isinstance(samples, list)
        assert len(samples) == 3


def test_a_warm_cache_changes_nothing() -> None:
    """In float32, as in test_equality.py."""
    with running(*INT8, "--dtype", "float32") as daemon, daemon.client() as client:
        cold = answers(client)
        warm = answers(client)
        assert [out.token_ids for out in warm] == [out.token_ids for out in cold]
        for out in warm:
            assert out.usage is not None
            assert out.usage.cached_tokens >= out.usage.prompt_tokens - 17, "all but the last page is cached"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--page-size", "4", "--chunked-prefill-size", "64", "--max-total-tokens", "600"],
        ["--page-size", "1", "--tp", "2", "--quantization", "int8"],
    ],
    ids=["a pool for a few", "two ranks, quantised matrices"],
)
def test_other_settings_go_with_it(flags: list[str], right_in_bfloat16: int) -> None:
    with running(*INT8, *flags) as daemon, daemon.client() as client:
        assert num_right(answers(client)) >= right_in_bfloat16 - 2
        if "--max-total-tokens" in flags:
            stories = client.generate(["One day,"] * 12, STORY)
            assert [len(story.token_ids) for story in stories] == [STORY.max_new_tokens] * 12
            assert int(client.stats()["num_retractions"]) > 0
            assert int(client.stats()["evicted_pages_total"]) > 0
            assert num_right(answers(client)) >= right_in_bfloat16 - 2
