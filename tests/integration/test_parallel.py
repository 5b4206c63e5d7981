"""Tensor and expert parallel engines give in float32 exactly what one rank gives: whole pipelines, real checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.daemon import ROOT
from vibe_sgl_lite import LLM, SamplingParams

MODELS = {"dense": "embedded", "moe": str(ROOT / "examples" / "tiny_model" / "moe")}
PROMPTS = [
    "Once upon a time there was a small cat",
    "Repeat: blue seven tree cat nine lamp",
    "One day, Tom and his friend went to the river. " * 6,
    "12 + 30 =",
    "Sort these numbers: 9 4 71 22 3",
]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=3)
SAMPLED = [
    SamplingParams(max_new_tokens=16, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=16, temperature=0.9, top_p=0.9, seed=2, ignore_eos=True),
    SamplingParams(max_new_tokens=16, temperature=1.3, top_k=20, seed=3, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_new_tokens=16, temperature=1.1, min_p=0.02, seed=4, n=2, ignore_eos=True),
]
LOGPROB_ERROR = 1e-4


class Answers:
    """What an engine with these settings says: greedy and sampled tokens, and the greedy ones' logprobs."""

    def __init__(self, model: str, **settings: Any) -> None:
        with LLM(MODELS[model], dtype="float32", num_threads=1, log_level="warning", **settings) as llm:
            greedy = llm.generate(PROMPTS, GREEDY)
            sampled = [llm.generate(PROMPTS[0], params) for params in SAMPLED]
            chat = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(temperature=0))
        self.text = chat.text
        self.tokens = [output.token_ids for output in greedy]
        for outputs in sampled:
            self.tokens += [output.token_ids for output in (outputs if isinstance(outputs, list) else [outputs])]
        self.logprobs = [entry.logprob for output in greedy for entry in output.logprobs or ()]


@pytest.fixture(scope="module")
def alone() -> dict[str, Answers]:
    """Both models on one rank."""
    return {model: Answers(model) for model in MODELS}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("dense", {"tp": 2}),
        pytest.param("moe", {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        ("moe", {"tp": 2, "ep": 2, "moe_dispatch": "all-to-all"}),
        pytest.param("dense", {"tp": 2, "speculative_algorithm": "ngram"}, marks=pytest.mark.slow),
        pytest.param("dense", {"tp": 4}, marks=pytest.mark.slow),
        pytest.param("dense", {"tp": 8}, marks=pytest.mark.slow),  # more ranks than KV heads
        pytest.param("moe", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("moe", {"tp": 4, "ep": 4}, marks=pytest.mark.slow),
        pytest.param("moe", {"tp": 4, "ep": 2}, marks=pytest.mark.slow),
        pytest.param("moe", {"tp": 4, "ep": 2, "moe_dispatch": "all-to-all"}, marks=pytest.mark.slow),
        pytest.param("moe", {"tp": 4, "ep": 4, "moe_dispatch": "all-to-all"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_as_one_rank(alone: dict[str, Answers], model: str, settings: dict[str, Any]) -> None:
    answers = Answers(model, debug_rank_digest=True, **settings)
    expected = alone[model]
    assert answers.tokens == expected.tokens
    assert answers.text == expected.text
    assert len(answers.logprobs) == len(expected.logprobs) == len(PROMPTS) * 24
    worst = max(abs(a - b) for a, b in zip(answers.logprobs, expected.logprobs, strict=True))
    assert worst < LOGPROB_ERROR
