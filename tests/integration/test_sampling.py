"""Sampling through the whole engine, in float32: seeds, samples, penalties after retraction, logprobs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vibe_sgl_lite
from tests.integration.daemon import Daemon, running
from vibe_sgl_lite import Client, Output, SamplingParams
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

EMBEDDED = Path(vibe_sgl_lite.__file__).parent / "models" / "tiny"
PROMPTS = ["Once upon a time", "The little dog", "In the garden", "Anna and Ben went to the park because"]
LENGTH = 24


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running("--dtype", "float32", "--page-size", "4") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def small(daemon: Daemon) -> Iterator[Client]:
    """An engine whose memory holds a fraction of the requests: most are retracted on the way."""
    flags = ["--dtype", "float32", "--page-size", "4", "--max-total-tokens", "240"]
    with running(*flags) as other, other.client() as client:
        yield client


def requests(seed: int, count: int) -> tuple[list[str], list[SamplingParams]]:
    """Prompts and parameters of every kind, all seeded and of one length."""
    chooser = random.Random(seed)
    prompts = [chooser.choice(PROMPTS) for _ in range(count)]
    params = []
    for number in range(count):
        kind: dict[str, Any] = chooser.choice(
            [
                {"temperature": 1.5, "top_k": -1, "top_p": 1.0},
                {"temperature": 1.0, "top_p": 0.9},
                {"temperature": 1.0, "top_k": 7, "min_p": 0.02},
                {"temperature": 0.0, "repetition_penalty": 1.3},
                {"temperature": 1.2, "frequency_penalty": 0.8, "presence_penalty": 0.5},
                {"temperature": 1.0, "repetition_penalty": 1.2, "logit_bias": {400: 3.0, 500: -5.0}},
            ]
        )
        params.append(SamplingParams(seed=1000 + number, max_new_tokens=LENGTH, min_new_tokens=LENGTH, **kind))
    return prompts, params


def test_seeds_alone_batched_and_retracted(client: Client, small: Client) -> None:
    prompts, params = requests(3, 50)
    alone = [client.generate(prompt, p).token_ids for prompt, p in zip(prompts, params, strict=True)]
    assert {len(ids) for ids in alone} == {LENGTH}
    batched = client.generate(prompts, params)
    assert [out.token_ids for out in batched] == alone
    retracted = small.generate(prompts, params)
    assert [out.token_ids for out in retracted] == alone
    assert int(small.stats()["num_retractions"]) > 0
    one, other = (SamplingParams(seed=seed, max_new_tokens=LENGTH, temperature=1.5, top_k=-1) for seed in (7, 8))
    assert client.generate(prompts[0], one).token_ids != client.generate(prompts[0], other).token_ids


@pytest.mark.slow
def test_seeds_on_two_ranks(client: Client) -> None:
    prompts, params = requests(3, 50)
    expected = [out.token_ids for out in client.generate(prompts, params)]
    with running("--dtype", "float32", "--tp", "2") as daemon, daemon.client() as other:
        assert [out.token_ids for out in other.generate(prompts, params)] == expected
        text = other.generate("x", SamplingParams(seed=1, temperature=1.5), regex="[a-z]{5,20}").text
    assert client.generate("x", SamplingParams(seed=1, temperature=1.5), regex="[a-z]{5,20}").text == text


def test_sample_i_is_seed_plus_i(client: Client) -> None:
    base: dict[str, Any] = {"temperature": 3.0, "top_k": -1, "top_p": 1.0, "max_new_tokens": 10, "ignore_eos": True}
    prompt = "Once upon a time there was a little dog who lived in the garden"
    client.flush_cache()
    samples: Any = client.generate(prompt, SamplingParams(seed=2**64 - 2, n=4, **base))
    assert [out.index for out in samples] == [0, 1, 2, 3]
    assert [out.sampling.seed for out in samples] == [2**64 - 2, 2**64 - 1, 0, 1]
    computed = [out.usage.prompt_tokens - out.usage.cached_tokens for out in samples]
    assert computed[0] == samples[0].usage.prompt_tokens
    assert max(computed[1:]) <= 4  # the last page only
    for out in samples:
        alone = client.generate(prompt, SamplingParams(seed=out.sampling.seed, **base))
        assert alone.token_ids == out.token_ids
    assert len({tuple(out.token_ids) for out in samples}) == 4
    pieces: dict[int, list[int]] = {}
    for chunk in client.stream(prompt, SamplingParams(seed=2**64 - 2, n=4, **base)):
        pieces.setdefault(chunk.index, []).extend(chunk.token_ids)
    assert pieces == {out.index: out.token_ids for out in samples}


def test_min_new_tokens_and_bias(client: Client) -> None:
    end = client.generate("Hi", SamplingParams(logit_bias={2041: 1000.0}, max_new_tokens=5))
    assert (end.finish_reason, end.matched, end.token_ids) == ("stop", 2041, [2041])
    late = client.generate("Hi", SamplingParams(logit_bias={2041: 1000.0}, max_new_tokens=9, min_new_tokens=4))
    assert (late.finish_reason, len(late.token_ids), late.token_ids[-1]) == ("stop", 5, 2041)


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)


def check_logprobs(out: Output, prompt_ids: list[int], reference: Any) -> None:
    ids = [*prompt_ids, *out.token_ids]
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0].float(), -1)
    assert out.logprobs is not None
    assert [entry.token_id for entry in out.logprobs] == out.token_ids
    assert "".join(entry.text for entry in out.logprobs) == out.text
    assert [entry.text_offset for entry in out.logprobs] == [
        len("".join(entry.text for entry in out.logprobs[:place])) for place in range(len(out.logprobs))
    ]
    entries = list(enumerate(out.logprobs, len(prompt_ids)))
    if out.prompt_logprobs is not None:
        assert [entry and entry.token_id for entry in out.prompt_logprobs] == [None, *prompt_ids[1:]]
        entries += [(place, entry) for place, entry in enumerate(out.prompt_logprobs) if entry is not None]
    for place, entry in entries:
        row = expected[place - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        best = row.topk(3)
        assert [top.token_id for top in entry.top] == best.indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_logprobs_equal_transformers_cold_and_warm(client: Client, small: Client, reference: Any) -> None:
    """Of the raw distribution, whatever else shapes the draw."""
    prompt = "Once upon a time there was a little dog who lived in the garden with his friend"
    ids = Tokenizer.from_file(EMBEDDED / "tokenizer.json").encode(prompt)
    params = SamplingParams(
        temperature=1.3, seed=3, presence_penalty=1.0, max_new_tokens=12, top_logprobs=3, ignore_eos=True
    )
    client.flush_cache()
    cold = client.generate(prompt, params)
    warm = client.generate(prompt, params)
    assert cold.usage is not None
    assert warm.usage is not None
    assert cold.usage.cached_tokens == 0 < warm.usage.cached_tokens
    scored = SamplingParams(max_new_tokens=3, temperature=0, top_logprobs=3, prompt_logprobs=True, ignore_eos=True)
    for out in (cold, warm, client.generate(prompt, scored), client.generate(prompt, scored)):
        check_logprobs(out, ids, reference)
    for out in small.generate([prompt] * 6, scored):
        check_logprobs(out, ids, reference)
