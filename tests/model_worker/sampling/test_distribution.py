"""20,000 draws against the exact probabilities (chi-square), each parameter alone and combined, for all vocabularies.

Draws are the rows of large batches that differ only in seed or position, so they also show that these make independent
draws. Seeds are fixed: a test that passes once always passes. By chance one in 10,000 would fail.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model_worker.sampling.reference import Floats, adjusted, chi_square_p, distribution, on_ranks, params
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group

DRAWS = 20_000
P_VALUE = 1e-4
PROMPT, GENERATED = [1, 1, 2], [2, 3, 3, 3]

HISTORY = {"frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"}
OVERWRITES = {*HISTORY, "logit_bias"}
ALONE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 300},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"min_p": 0.01},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"repetition_penalty": 1.7},
    {"logit_bias": {0: 2.0, 5: -3.0}},
    {"min_new_tokens": 9, "stop_token_ids": (0, 4)},
]
# More candidates than are sorted at once: a second's work each, and one of the combinations has as many.
WIDE: list[dict[str, Any]] = [{"top_k": 300}, {"top_p": 0.95}]
COMBINED: list[dict[str, Any]] = [
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.03},
    {"temperature": 1.2, "top_k": 400, "top_p": 0.97, "min_p": 0.001},
    {
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {0: 1.0},
        "min_new_tokens": 9,
        "end_token_ids": (4,),
    },
]


def draws(logits: Tensor, fields: dict[str, Any], batch: int, total: int, group: Group | None = None) -> Tensor:
    """`total` tokens drawn in batches of `batch` rows, all with these logits and the same history.

    Rows differ in their seeds, and, where no parameter looks at the history, more in their positions.
    """
    known = [*PROMPT, *GENERATED]
    seeds = batch if HISTORY & fields.keys() else max(1, batch // 50)
    sampler = Sampler(len(logits), group or Group(), torch.tensor(known, dtype=torch.int32).repeat(seeds, 1))
    rows = logits[sampler.vocab].repeat(batch, 1)
    found = []
    for start in range(0, total, batch):
        number = start + np.arange(batch)
        if start == 0 or seeds == batch:
            for slot in range(seeds):
                sampler.admit(slot, params(seed=start + slot, **fields), len(PROMPT))
        positions = np.full(batch, len(known)) if seeds == batch else number // seeds
        # Penalties and bias overwrite the logits.
        logits_now = rows.clone() if OVERWRITES & fields.keys() else rows
        found.append(sampler.sample(logits_now, number % seeds, positions).token_ids)
    return torch.cat(found)[:total]


def make_logits(vocab_size: int) -> Tensor:
    """Like a model's: a few likely tokens, also those that the histories hold, over a long tail."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits[:8] += torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]) + (np.log(vocab_size / 8))
    return logits


def check(vocab_size: int, fields: dict[str, Any], batch: int, total: int = DRAWS) -> None:
    logits = make_logits(vocab_size)
    counts = torch.bincount(draws(logits, fields, batch, total), minlength=vocab_size).double().numpy()
    p = params(**fields)
    exact = distribution(adjusted(logits.double().numpy(), p, PROMPT, GENERATED), p)
    assert counts.sum() == total
    assert chi_square_p(counts, exact) > P_VALUE


@pytest.mark.parametrize("fields", [*ALONE, *COMBINED], ids=str)
def test_draws_fit(fields: dict[str, Any]) -> None:
    check(8, fields, DRAWS)


@pytest.mark.parametrize("fields", [*(f for f in ALONE if f not in WIDE), *COMBINED], ids=str)
def test_draws_fit_with_a_long_tail(fields: dict[str, Any]) -> None:
    check(500, fields, 500)


def test_draws_fit_on_the_real_vocabulary() -> None:
    check(151_936, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}, batch=200, total=DRAWS // 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fields", [*ALONE, *COMBINED], ids=str)
@pytest.mark.parametrize(("vocab_size", "batch"), [(20_000, 500), (151_936, 100)])
def test_draws_fit_on_large_vocabularies(vocab_size: int, batch: int, fields: dict[str, Any]) -> None:
    check(vocab_size, fields, batch)


def test_the_test_notices_a_wrong_distribution() -> None:
    """The statistic has teeth: draws at a temperature 5 % off do not fit."""
    logits = make_logits(500)
    counts = torch.bincount(draws(logits, {"temperature": 1.05}, 5000, DRAWS), minlength=500).double().numpy()
    exact = distribution(logits.double().numpy(), params(temperature=1.0))
    assert chi_square_p(counts, exact) < P_VALUE


def test_draws_on_ranks_are_the_draws_of_one() -> None:
    logits = make_logits(496)
    for fields in ({"temperature": 0.9}, {"top_p": 0.9}, {"top_k": 12, "min_p": 0.02}):
        alone = draws(logits, fields, 1000, 1000)
        for found in on_ranks(4, lambda group, fields=fields: draws(logits, fields, 1000, 1000, group)):  # type: ignore[misc]
            assert torch.equal(found, alone)


def test_consecutive_draws_are_independent() -> None:
    """Pairs of tokens of one seed at neighbouring positions, and of neighbouring seeds, fit the product."""
    logits = make_logits(8)
    exact = distribution(logits.double().numpy(), params())
    found = draws(logits, {}, DRAWS, DRAWS)  # row i: seed i % 400, position i // 400
    by_position = found.view(-1, DRAWS // 50)
    for first, second in ((by_position[::2], by_position[1::2]), (by_position[:, ::2], by_position[:, 1::2])):
        pairs = torch.bincount((first * 8 + second).flatten(), minlength=64).double().numpy()
        product: Floats = np.outer(exact, exact).flatten().astype(np.float64)
        assert chi_square_p(pairs, product) > P_VALUE
