"""Logprobs of the raw distribution: against log_softmax, whatever else a row asks for, on any ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.model_worker.sampling.reference import Row, make_sampler, on_ranks, params
from vibe_sgl_lite.model_worker.sampling.sampler import SampleOutput, Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.messages import TokenLogprob

VOCAB = 400
FIELDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": True},
    {"temperature": 0.7, "logprobs": True, "top_logprobs": 5},
    {"temperature": 2.0, "top_k": 50},
    {"temperature": 1.5, "top_p": 0.9, "logprobs": True, "top_logprobs": 20, "logit_bias": {3: 50.0}},
    {"logprobs": True, "top_logprobs": 1, "frequency_penalty": 2.0, "repetition_penalty": 3.0},
    {"temperature": 0.0},
]


def make_rows(dtype: torch.dtype) -> list[Row]:
    logits = (torch.randn(len(FIELDS), VOCAB, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    return [Row(x, params(**fields), [1, 2], [3, 3]) for x, fields in zip(logits, FIELDS, strict=True)]


def run(rows: list[Row], group: Group) -> tuple[list[int], list[tuple[int, TokenLogprob]]]:
    sampler = make_sampler(rows, group)
    logits = torch.stack([row.logits for row in rows])[:, sampler.vocab].contiguous()
    output: SampleOutput = sampler.sample(logits, np.arange(len(rows)), np.full(len(rows), 4))
    assert output.logprobs is not None
    return output.token_ids.tolist(), output.logprobs.entries()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_logprobs_equal_log_softmax(dtype: torch.dtype, size: int) -> None:
    rows = make_rows(dtype)
    exact = torch.stack([row.logits for row in rows]).double().log_softmax(1)
    results = on_ranks(size, lambda group: run(rows, group)) if size > 1 else [run(rows, Group())]
    assert all(result == results[0] for result in results)
    token_ids, entries = results[0]
    assert [row for row, _ in entries] == [0, 1, 3, 4]
    assert token_ids[3] == 3  # the bias decides the token, the logprob is the model's own
    for row, entry in entries:
        assert entry.token_id == token_ids[row]
        assert entry.logprob == pytest.approx(exact[row, entry.token_id].item(), abs=1e-5)
        best = exact[row].sort(stable=True, dim=0, descending=True)
        wanted = rows[row].params.top_logprobs
        assert [token for token, _ in entry.top] == best.indices[:wanted].tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values[:wanted].tolist(), abs=1e-5)


def test_asking_for_logprobs_changes_no_token() -> None:
    asked = make_rows(torch.float32)
    fields = [{**f, "logprobs": False} for f in FIELDS]
    plain = [Row(r.logits, params(**f), r.prompt, r.generated) for r, f in zip(asked, fields, strict=True)]
    sampler = make_sampler(plain)
    logits = torch.stack([row.logits for row in plain])
    output = sampler.sample(logits, np.arange(len(plain)), np.full(len(plain), 4))
    assert output.logprobs is None
    assert output.token_ids.tolist() == run(asked, Group())[0]


@pytest.mark.parametrize("size", [1, 2])
def test_prompt_logprobs(size: int) -> None:
    logits = torch.randn(30, VOCAB) * 4
    following = torch.randint(VOCAB, (30,))
    exact = logits.double().log_softmax(1)

    def work(group: Group) -> list[TokenLogprob]:
        sampler = Sampler(VOCAB, group, torch.zeros((1, 1), dtype=torch.int32))
        found = sampler.logprobs_of(logits[:, sampler.vocab].contiguous(), following, 3)
        return [entry for _, entry in found.entries()]

    results = on_ranks(size, work) if size > 1 else [work(Group())]
    for entries in results:
        assert [entry.token_id for entry in entries] == following.tolist()
        expected = exact.gather(1, following[:, None])[:, 0].tolist()
        assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-5)
        assert [[token for token, _ in entry.top] for entry in entries] == exact.topk(3).indices.tolist()


def test_more_alternatives_than_a_small_vocabulary_has() -> None:
    rows = [Row(torch.randn(8), params(logprobs=True, top_logprobs=20))]
    sampler = make_sampler(rows)
    output = sampler.sample(rows[0].logits[None].clone(), np.array([0]), np.array([0]))
    assert output.logprobs is not None
    [(_, entry)] = output.logprobs.entries()
    assert sorted(token for token, _ in entry.top) == list(range(8))
