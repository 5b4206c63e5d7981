"""Penalties, bias and held-back end tokens: against the reference and transformers, and their place in the order."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tests.model_worker.sampling.reference import Row, adjusted, on_ranks, params, sample
from tests.model_worker.sampling.test_sampler import random_rows
from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.model_worker.sampling.adjust import LogitAdjuster
from vibe_sgl_lite.model_worker.sampling.slots import SlotSampling
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

VOCAB = 200


def adjust(rows: list[Row], vocab: slice = slice(0, VOCAB)) -> Tensor:
    tokens = torch.zeros((len(rows), 64), dtype=torch.int32)
    slots = SlotSampling(len(rows), VOCAB, vocab, CpuDevice())
    for slot, row in enumerate(rows):
        tokens[slot, : row.position] = torch.tensor([*row.prompt, *row.generated], dtype=torch.int32)
        slots.admit(slot, row.params, len(row.prompt))
    logits = torch.stack([row.logits for row in rows])[:, vocab].contiguous()
    positions = np.array([row.position for row in rows])
    adjuster = LogitAdjuster(tokens, vocab)
    plan = slots.plan(np.arange(len(rows)))
    once = adjuster.adjust(logits.clone(), plan, torch.from_numpy(positions), positions)
    again = adjuster.adjust(logits.clone(), plan, torch.from_numpy(positions), positions)
    assert torch.equal(once, again)  # the count tables are clean after use
    return once


def one(fields: dict[str, Any], prompt: list[int], generated: list[int], logits: Tensor | None = None) -> Row:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) if logits is None else logits
    return Row(logits, params(**fields), prompt, generated)


def test_equals_reference() -> None:
    rows = random_rows(77, 150, VOCAB)
    expected = [adjusted(r.logits.double().numpy(), r.params, r.prompt, r.generated) for r in rows]
    np.testing.assert_allclose(adjust(rows).double().numpy(), np.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_shards_are_adjusted_alike(size: int) -> None:
    rows = random_rows(78, 80, VOCAB)
    width = VOCAB // size
    parts = [adjust(rows, slice(rank * width, (rank + 1) * width)) for rank in range(size)]
    assert torch.equal(torch.cat(parts, dim=1), adjust(rows))


def test_repetition_equals_transformers() -> None:
    for penalty in (0.7, 1.05, 1.8):
        row = one({"repetition_penalty": penalty}, [5, 5, 9, 0], [9, 17, 199])
        ids = torch.LongTensor([[*row.prompt, *row.generated]])
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.FloatTensor(row.logits[None].clone()))
        assert torch.equal(adjust([row]), expected)


def test_bias_equals_transformers() -> None:
    bias = {3: 2.5, 0: -1.25, 199: 30.0}
    row = one({"logit_bias": bias}, [1], [2])
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(adjust([row]), processor(torch.LongTensor([[1, 2]]), torch.FloatTensor(row.logits[None])))


def test_min_new_tokens_equals_transformers() -> None:
    for generated in range(6):
        row = one({"min_new_tokens": 4, "end_token_ids": (7, 8), "stop_token_ids": (9, 7)}, [1, 2], [3] * generated)
        processor = MinNewTokensLengthLogitsProcessor(2, 4, [7, 8, 9])
        ids = torch.LongTensor([[*row.prompt, *row.generated]])
        assert torch.equal(adjust([row]), processor(ids, torch.FloatTensor(row.logits[None].clone())))


def test_frequency_counts_and_presence_does_not() -> None:
    """Prompt tokens do not count; a token generated three times pays its frequency three times, its presence once."""
    zeros = torch.zeros(VOCAB)
    frequency, presence, repetition = adjust(
        [
            one({"frequency_penalty": 0.5}, [4, 6], [4, 5, 4, 4], zeros),
            one({"presence_penalty": 0.5}, [4, 6], [4, 5, 4, 4], zeros),
            one({"repetition_penalty": 2.0}, [4, 6], [4, 5, 4, 4], zeros + 1),
        ]
    )
    assert (frequency[4], frequency[5], frequency[6]) == (-1.5, -0.5, 0.0)
    assert (presence[4], presence[5], presence[6]) == (-0.5, -0.5, 0.0)
    assert (repetition[4], repetition[5], repetition[6], repetition[7]) == (0.5, 0.5, 0.5, 1.0)


def test_penalties_with_nothing_generated_yet() -> None:
    row = one({"frequency_penalty": 1.0, "presence_penalty": 1.0}, [4, 6], [])
    assert torch.equal(adjust([row])[0], row.logits)


def test_held_back_comes_after_bias() -> None:
    fields = {"temperature": 0.0, "logit_bias": {7: 1000.0}, "end_token_ids": (7,), "min_new_tokens": 2}
    held, free = one(fields, [1], [2]), one(fields, [1], [2, 2])
    assert sample([held]).item() != 7
    assert sample([free]).item() == 7


def test_more_rows_than_one_count_table() -> None:
    rows = [one({"frequency_penalty": 1.0}, [1], [2] * (n % 5), torch.zeros(VOCAB)) for n in range(100)]
    assert adjust(rows)[:, 2].tolist() == [-float(n % 5) for n in range(100)]


def test_plain_rows_cost_no_copy_and_change_nothing() -> None:
    plan_of: list[ResolvedSampling] = [params(), params(temperature=0.0)]
    slots = SlotSampling(2, VOCAB, slice(0, VOCAB), CpuDevice())
    for slot, p in enumerate(plan_of):
        slots.admit(slot, p, 1)
    logits, positions = torch.randn(2, VOCAB).bfloat16(), np.array([1, 1])
    adjuster = LogitAdjuster(torch.zeros((2, 4), dtype=torch.int32), slice(0, VOCAB))
    same = adjuster.adjust(logits, slots.plan(np.arange(2)), torch.from_numpy(positions), positions)
    assert same is logits


def test_penalised_rows_on_ranks() -> None:
    rows = random_rows(79, 60, VOCAB, frequency_penalty=0.9, repetition_penalty=1.2)
    expected = sample(rows).tolist()
    assert on_ranks(4, lambda group: sample(rows, group).tolist()) == [expected] * 4
