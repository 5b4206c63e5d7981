"""Speculation changes no token: scheduler and rank with prompt lookup, against transformers and a slow sampler.

The oracle goes over prompt and output once: transformers' logits at each place, in float32, and the sampler's
specification in numpy say which token must be the next one. Grammars and budgets, which have no such reference, are
compared with the same engine without speculation.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch
import transformers

import vibe_sgl_lite
from benchmarks.internal.in_process import InProcess, Sample
from examples.tiny_model.stories import story
from tests.model_worker.sampling.reference import adjusted, draw, params
from tests.runtime.text.test_grammar import make_grammar
from vibe_sgl_lite.model_worker.ngram import NgramDrafter
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, ThinkingRules
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

FOLDER = Path(vibe_sgl_lite.__file__).parent / "models" / "tiny"
TOKENIZER = Tokenizer.from_file(FOLDER / "tokenizer.json")
END = 2041
CHEAP = {"base_tokens": 2000.0, "timed": False}  # drafts: nothing is learned of their cost, and this is the guess
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    {"temperature": 0.5, "repetition_penalty": 1.05, "frequency_penalty": 0.1, "logit_bias": {300: 1.0}},
    {"temperature": 0.0, "min_new_tokens": 30, "logprobs": True},
    {"temperature": 0.3, "min_new_tokens": 20, "stop_token_ids": (10, 300)},
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> InProcess:
    return InProcess(FOLDER, pages=400)


def ask(text: str) -> list[int]:
    return TOKENIZER.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def prompts(count: int) -> list[list[int]]:
    """Stories that begin again, and words to copy: what comes has mostly been there."""
    rng = Random(7)
    made = []
    for number in range(count):
        told = story(rng)
        if number % 2:
            made.append(ask("Repeat: " + " ".join(rng.choices(told.split(), k=rng.randint(4, 10)))))
        else:
            made.append(TOKENIZER.encode(told + "\n\n" + told[: len(told) // rng.randint(2, 5)]))
    return made


def check(prompt: list[int], p: ResolvedSampling, sample: Sample, model: Any) -> None:
    with torch.inference_mode():
        every = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 :]
    for index, token in enumerate(sample.tokens):
        x = adjusted(every[index].numpy(), p, prompt, sample.tokens[:index])
        assert token == (int(x.argmax()) if p.temperature == 0 else draw(x, p, len(prompt) + index))
    ends = {*p.end_token_ids, *p.stop_token_ids}
    assert not ends & {*sample.tokens[:-1]}
    assert sample.finish is not None
    assert sample.finish.reason == ("stop" if sample.tokens[-1] in ends else "length")
    assert sample.finish.reason == "stop" or len(sample.tokens) == p.max_new_tokens
    if p.logprobs:
        scores = torch.log_softmax(every[:-1], -1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert [entry.token_id for entry in sample.logprobs] == sample.tokens
        assert [entry.logprob for entry in sample.logprobs] == pytest.approx(scores.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("count", "seed", "least"),
    [
        (2, None, 0.5),
        pytest.param(8, None, 0.5, marks=pytest.mark.slow),
        pytest.param(2, 1, 0.0, marks=pytest.mark.slow),
    ],
    ids=["itself", "itself, pressed", "random weights"],
)
def test_a_draft_model_changes_no_token(count: int, seed: int | None, least: float) -> None:
    """The model itself, whose drafts mostly hold, beside chunks, with prefixes from the cache and retractions; and one
    of random weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    asked = prompts(count)
    sampling = [
        params(seed=number, end_token_ids=(END,), max_new_tokens=32, **KINDS[number % len(KINDS)])
        for number in range(count)
    ]
    engine = InProcess(FOLDER, pages=60, page_size=4)
    settings: dict[str, Any] = {"chunked_prefill_size": 64, "conservativeness": 0.1, **CHEAP}
    settings["max_running_requests"] = count
    samples = engine.serve(asked, sampling, engine.draft_model(5, seed=seed), **settings)
    stats = engine.core.stats()
    assert count < 8 or min(int(stats["num_retractions"]), int(stats["cached_tokens_total"])) > 0
    drafted, accepted = int(stats["draft_tokens_total"]), int(stats["accepted_tokens_total"])
    assert drafted > 5
    assert accepted >= least * drafted
    for prompt, p, sample in zip(asked, sampling, samples, strict=True):
        check(prompt, p, sample, model)


@pytest.mark.parametrize("pressed", [False, True], ids=["room for all", "retraction"])
def test_tokens_are_those_of_transformers_and_the_specification(pressed: bool) -> None:
    """All ways to draw in one batch, prompts in chunks beside them; and with too few pages for all."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    asked = prompts(8)
    sampling = [
        params(seed=number, end_token_ids=(END,), max_new_tokens=32, **kind)
        for number, kind in zip(range(len(asked)), itertools.cycle(KINDS), strict=False)
    ]
    engine = InProcess(FOLDER, pages=80 if pressed else 1600, page_size=4)
    settings: dict[str, Any] = {"chunked_prefill_size": 64, "conservativeness": 0.1, **CHEAP}
    samples = engine.serve(asked, sampling, NgramDrafter(6), **settings)
    stats = engine.core.stats()
    assert (int(stats["num_retractions"]) > 0) == pressed
    assert int(stats["draft_tokens_total"]) > int(stats["accepted_tokens_total"]) > 25
    for prompt, p, sample in zip(asked, sampling, samples, strict=True):
        check(prompt, p, sample, model)


def test_grammars_and_thinking_budgets_are_followed_as_without(engine: InProcess) -> None:
    """Masks of each draft, forced ends of thinking in the middle of one, and grammars behind it."""
    names = {"type": "array", "items": {"enum": ["sun", "moon", "the sun and the moon"]}, "minItems": 5, "maxItems": 9}
    grammars = [make_grammar(json.dumps(names), None, None), make_grammar(None, "(yes or no, ){3,9}yes", None), None]
    (close,) = TOKENIZER.encode("</think>")
    closing = tuple(TOKENIZER.encode("\n</think>\n\n"))
    tail = closing[closing.index(close) + 1 :]
    asked, sampling = [], []
    for number, (grammar, limit) in enumerate(itertools.product(grammars, [None, 5, 23])):
        rules = ThinkingRules(TOKENIZER.encode("<think>")[0], close, True, limit, closing, tail)
        asked.append(
            TOKENIZER.encode("<|im_start|>user\nSort: 4 4 4 4 4 4 4 4 4<|im_end|>\n<|im_start|>assistant\n<think>\n")
        )
        base = params(seed=number, temperature=0.4, end_token_ids=(END,), max_new_tokens=80)
        thinking = rules if limit is not None else None
        sampling.append(msgspec.structs.replace(base, grammar=grammar, thinking=thinking))
    expected = engine.serve(asked, sampling)
    steps = int(engine.core.stats()["steps_total"])
    settings: dict[str, Any] = CHEAP
    samples = engine.serve(asked, sampling, NgramDrafter(5), **settings)
    assert int(engine.core.stats()["steps_total"]) < steps
    assert int(engine.core.stats()["accepted_tokens_total"]) > 50
    for got, right in zip(samples, expected, strict=True):
        assert (got.tokens, got.finish) == (right.tokens, right.finish)
