"""The sampler against a slow reference: the same token for every row, alone, in mixed batches, on any ranks."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.model_worker.sampling.reference import Row, on_ranks, params, sample
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group


def random_row(rng: random.Random, vocab_size: int, **fixed: Any) -> Row:
    """A row with any mix of settings, its logits smooth, peaked, flat or full of ties."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn(vocab_size, generator=generator) * rng.choice([0.3, 2.0, 6.0])
    kind = rng.choice(["smooth", "ties", "equal", "bfloat16"])
    if kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "equal":
        logits = torch.full_like(logits, 1.5)
    elif kind == "bfloat16":
        logits = logits.bfloat16().float()
    fields: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        "top_k": rng.choice([-1, -1, 1, 5, 50, 300, vocab_size, 2 * vocab_size]),
        "top_p": rng.choice([1.0, rng.uniform(0.01, 0.3), rng.uniform(0.3, 0.99), 0.9999]),
        "min_p": rng.choice([0.0, 0.0, rng.uniform(0.0, 0.05), rng.uniform(0.05, 1.0)]),
        "seed": rng.getrandbits(64),
    }
    if rng.random() < 0.5:
        fields |= {
            "frequency_penalty": rng.choice([0.0, rng.uniform(-2, 2)]),
            "presence_penalty": rng.choice([0.0, rng.uniform(-2, 2)]),
            "repetition_penalty": rng.choice([1.0, rng.uniform(0.5, 2)]),
            "min_new_tokens": rng.choice([0, 5]),
            "logit_bias": {rng.randrange(vocab_size): rng.uniform(-5, 5) for _ in range(rng.randrange(4))},
            "stop_token_ids": tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(3))),
            "end_token_ids": (rng.randrange(vocab_size),),
        }
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 12))]
    generated = [rng.choice([*prompt, rng.randrange(vocab_size)]) for _ in range(rng.randrange(12))]
    return Row(logits, params(**{**fields, **fixed}), prompt, generated)


def random_rows(seed: int, count: int, vocab_size: int, **fixed: Any) -> list[Row]:
    rng = random.Random(seed)
    return [random_row(rng, vocab_size, **fixed) for _ in range(count)]


@pytest.mark.parametrize(("vocab_size", "count"), [(8, 300), (64, 200), (100, 200), (1000, 120), (4999, 60)])
def test_mixed_batch_equals_reference(vocab_size: int, count: int) -> None:
    rows = random_rows(vocab_size, count, vocab_size)
    assert sample(rows).tolist() == [row.expected() for row in rows]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(5, 1000)
    logits[1, 700] = logits[1, 130] = logits[1, 131] = 2.0
    logits[2] = -0.0
    logits[2, 3] = 0.0
    logits[3] = float("-inf")
    logits[3, 999] = -5.0
    logits[4, 64:] = 1.0
    rows = [Row(x, params(temperature=t)) for x in logits for t in (0.0, 1e-6)]
    assert sample(rows).tolist() == [0, 0, 130, 130, 0, 0, 999, 999, 64, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_equals_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 10_007).to(dtype)
    rows = [Row(x, params(temperature=0.0)) for x in logits]
    assert torch.equal(sample(rows), logits.argmax(1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_rows_take_the_kernel_argmax(size: int) -> None:
    """Alone and beside others, on any ranks: the reference's token, ties to the lowest id."""
    rows = random_rows(71, 60, 1000) + random_rows(72, 20, 1000, temperature=0.0)
    ties = [Row(torch.randn(1000).mul(2).round(), params(temperature=0.0)) for _ in range(40)]
    equal = [Row(torch.full((1000,), x), params(temperature=0.0)) for x in (0.0, -0.0, float("-inf"))]

    def on_rank(group: Group) -> tuple[list[int], list[int], int]:
        kernels = load()
        assert kernels is not None, "the tests need a compiler"
        shapes = []

        def counted(logits: torch.Tensor) -> torch.Tensor:
            shapes.append(logits.shape)
            return kernels.argmax(logits)

        mixed = sample([*rows, *ties], group, counted).tolist()
        greedy = sample([*ties, *equal], group, counted).tolist()
        wrong = [torch.full((1000,), float("nan")), torch.zeros(1000).index_fill_(0, torch.tensor([900]), float("nan"))]
        for token in sample([Row(x, params(temperature=0.0)) for x in wrong], group, counted).tolist():
            assert 0 <= token < 1000
        return mixed, greedy, len(shapes)

    for found in on_ranks(size, on_rank) if size > 1 else [on_rank(Group())]:
        assert found == (
            [row.expected() for row in (*rows, *ties)],
            [row.expected() for row in (*ties, *equal)],
            3,
        )


def test_top_k_of_one_is_greedy() -> None:
    rows = random_rows(5, 40, 500, temperature=3.0, top_k=1)
    greedy = [Row(r.logits, params(temperature=0.0), r.prompt, r.generated) for r in rows]
    plain = [Row(r.logits, params(temperature=3.0, top_k=1), r.prompt, r.generated) for r in rows]
    assert torch.equal(sample(plain), sample(greedy))


def test_bfloat16_logits_equal_their_float32_values() -> None:
    rows = random_rows(11, 60, 700)
    rounded = [Row(r.logits.bfloat16(), r.params, r.prompt, r.generated) for r in rows]
    exact = [Row(r.logits.bfloat16().float(), r.params, r.prompt, r.generated) for r in rows]
    assert torch.equal(sample(rounded), sample(exact))


def test_a_row_depends_on_nothing_else_in_the_batch() -> None:
    """Alone, in the batch, in the batch reversed, and with rows that force other widths beside it."""
    rows = random_rows(23, 60, 800)
    together = sample(rows).tolist()
    assert [sample([row]).item() for row in rows] == together
    assert sample(rows[::-1]).tolist() == together[::-1]
    flat = [Row(torch.zeros(800), params(temperature=1.0, top_k=k, seed=k)) for k in (2, 200, 256, 257, 790)]
    assert sample([*flat, *rows]).tolist()[len(flat) :] == together


def test_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1000)
    by_seed = sample([Row(logits, params(seed=seed)) for seed in range(200)])
    by_position = sample([Row(logits, params(seed=1), range(n)) for n in range(200)])
    assert len(set(by_seed.tolist())) > 150
    assert len(set(by_position.tolist())) > 150


def test_a_slot_is_forgotten_when_another_row_comes() -> None:
    sampler = Sampler(50, Group(), torch.zeros((2, 4), dtype=torch.int32))
    logits = torch.randn(1, 50)
    slots, positions = np.array([1]), np.array([0])
    sampler.admit(1, params(temperature=0.0, logit_bias={7: 100.0}), 0)
    assert sampler.sample(logits.clone(), slots, positions).token_ids.item() == 7
    assert sampler.sample(logits.clone(), slots, positions).token_ids.item() == 7
    sampler.release(1)
    sampler.admit(1, params(temperature=0.0), 0)
    assert sampler.sample(logits.clone(), slots, positions).token_ids.item() == logits.argmax().item()


def test_readmission_after_retraction_continues_the_same_tokens() -> None:
    """Generate 30 tokens straight; then again, but in another slot from the middle on, with its tokens replayed."""
    table = torch.randn(100, 100) * 2
    p = params(temperature=1.2, top_p=0.9, frequency_penalty=0.7, repetition_penalty=1.3, seed=2**64 - 5)

    def run(moves: dict[int, int]) -> list[int]:
        tokens = torch.zeros((4, 64), dtype=torch.int32)
        sampler = Sampler(100, Group(), tokens)
        history, slot = [3, 14, 15], 0
        sampler.admit(slot, p, 3)
        tokens[slot, :3] = torch.tensor(history)
        for step in range(30):
            if step in moves:
                sampler.release(slot)
                tokens[slot] = -1
                slot = moves[step]
                sampler.admit(slot, p, 3)
                tokens[slot, : len(history)] = torch.tensor(history)
            logits = table[history[-1]][None].clone()
            token = int(sampler.sample(logits, np.array([slot]), np.array([len(history)])).token_ids.item())
            tokens[slot, len(history)] = token
            history.append(token)
        return history

    assert run({}) == run({12: 2, 13: 1, 25: 0})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_harms_no_other(bad: float) -> None:
    """Rows with NaN or inf fail elsewhere; here they give some id in range and leave the others alone."""
    rows = random_rows(31, 30, 300)
    expected = sample(rows).tolist()
    broken = [
        Row(torch.full((300,), bad), params(**fields))
        for fields in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 290})
    ]
    one = torch.randn(300)
    one[17] = bad
    broken += [Row(one, row.params) for row in broken]
    tokens = sample([*broken, *rows]).tolist()
    assert tokens[len(broken) :] == expected
    assert all(0 <= token < 300 for token in tokens)


@pytest.mark.parametrize(("size", "vocab_size"), [(2, 8), (2, 601), (4, 600), (4, 5001), (8, 1003), (4, 9)])
def test_ranks_equal_one_rank(size: int, vocab_size: int) -> None:
    rows = random_rows(size * vocab_size, 60, vocab_size)
    expected = sample(rows).tolist()
    for tokens in on_ranks(size, lambda group: sample(rows, group).tolist()):
        assert tokens == expected
