"""The fused draw against scores made in full with `sampling/noise.py`, and against the sampler of plain torch."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.model_worker.gpu.draw import GpuDraw
from vibe_sgl_lite.model_worker.gpu.kernels import sample as kernels
from vibe_sgl_lite.model_worker.sampling.noise import counters, gumbel, row_keys
from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, spread
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling


class InTurn(Group):
    """One of several ranks that run one after another, twice: what they gather is there from the first time."""

    def __init__(self, rank: int, gathered: list[Tensor], size: int) -> None:
        for name, value in (("rank", rank), ("size", size), ("gathered", gathered)):
            object.__setattr__(self, name, value)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered: list[Tensor] = self.__dict__["gathered"]
        gathered.append(x)
        return torch.cat((gathered * self.size)[: self.size])


def draw(
    logits: Tensor,
    inverse_temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    group: Group | None = None,
    first: int = 0,
) -> Tensor:
    """One row a slot, in falling order of slots."""
    group = group or Group()
    rows = len(logits)
    slots = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=logits.device)
    scratch = torch.empty(rows * kernels.num_chunks(logits.shape[1]), device=logits.device)
    token_ids = torch.full((rows,), -7, dtype=torch.int32, device=logits.device)
    tokens = torch.full((2, rows), -7, dtype=torch.int32, device=logits.device)
    places = torch.arange(2 * rows - 1, -1, -2, device=logits.device)
    flipped = inverse_temperatures.flip(0), seeds.flip(0)
    off = (
        torch.zeros(rows, dtype=torch.int32, device=logits.device),
        torch.ones_like(flipped[0]),
        torch.ones_like(flipped[0]),
    )
    lengths = torch.arange(rows, dtype=torch.int32, device=logits.device)
    kernels.sample(
        logits, slots, positions, *flipped, off, scratch, token_ids, tokens, places, lengths, pdl=False, group=group,
        first=first,
    )  # fmt: skip
    assert lengths.tolist() == [0, *range(2, rows + 1)]
    assert torch.equal(tokens.view(-1)[places], token_ids.clamp(min=0))
    assert int((tokens == -7).sum()) == rows
    return token_ids


@pytest.mark.parametrize("vocab", [300, kernels.CHUNK, 3 * kernels.CHUNK + 17])
@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
def test_the_same_token_as_with_exact_noise_everywhere(vocab: int, spread: float, device: torch.device) -> None:
    rows = 8 if vocab > kernels.CHUNK else 24
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn((rows, vocab), generator=generator) * spread).to(device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device)
    positions = torch.randint(0, 40_960, (rows,), generator=generator).to(device)
    inverse = torch.linspace(0.5, 4.0, rows, dtype=torch.float64, device=device)
    noise = gumbel(row_keys(seeds, positions)[:, None], counters(torch.arange(vocab, device=device)))
    expected = (logits.double() * inverse[:, None] + noise).argmax(1)
    assert draw(logits, inverse, seeds, positions).tolist() == expected.tolist()


def test_greedy_rows_take_the_lowest_id_of_equals(device: torch.device) -> None:
    vocab = 2 * kernels.CHUNK + 5
    logits = torch.zeros((3, vocab), dtype=torch.bfloat16, device=device)
    logits[0, 11] = logits[0, 4000] = logits[0, vocab - 1] = 2.0
    logits[1, kernels.CHUNK + 3] = logits[1, vocab - 1] = 1.0
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    drawn = draw(logits, torch.zeros(3, dtype=torch.float64, device=device), zeros, zeros)
    assert drawn.tolist() == [11, kernels.CHUNK + 3, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_no_numbers_is_told(bad: float, device: torch.device) -> None:
    logits = torch.randn((3, 500), device=device)
    logits[1] = bad
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    drawn = draw(logits, torch.ones(3, dtype=torch.float64, device=device), zeros, zeros)
    assert drawn[1] == -1
    assert (drawn[[0, 2]] >= 0).all()


def test_ranks_draw_the_token_of_one(device: torch.device) -> None:
    rows, vocab, ranks = 6, 2 * (kernels.CHUNK + 100) + 1, 2
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((rows, vocab), generator=generator).to(device)
    logits[4] = float("nan")
    logits[5] = torch.arange(vocab) % (vocab // 2)  # equals on two ranks
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device)
    positions = torch.arange(rows, device=device)
    inverse = torch.tensor([0.0, 0.7, 1.0, 3.0, 1.0, 0.0], dtype=torch.float64, device=device)
    expected = draw(logits, inverse, seeds, positions).tolist()
    assert expected[4:] == [-1, vocab // 2 - 1]
    assert {token < vocab // 2 for token in expected[:4]} == {True, False}
    gathered: list[Tensor] = []
    parts = [logits[:, : vocab // 2].contiguous(), logits[:, vocab // 2 :].contiguous()]
    for _ in range(2):
        drawn = [
            draw(part, inverse, seeds, positions, InTurn(rank, gathered, ranks), rank * (vocab // 2)).tolist()
            for rank, part in enumerate(parts)
        ]
    assert drawn == [expected] * ranks


def drawn_by_both(
    logits: Tensor,
    sampling: Sequence[ResolvedSampling],
    device: torch.device,
    group: Group | None = None,
    part: slice = slice(None),
) -> tuple[list[int] | None, list[int]]:
    """By the fused draw, None if it does not take them, and by the sampler of plain torch on the CPU. part: of the
    vocabulary, if this rank of the group has but a part."""
    rows, vocab = logits.shape
    tokens = torch.zeros((rows + 1, 8), dtype=torch.int32, device=device)
    on_device = CpuDevice() if device.type == "cpu" else cuda()
    fused = GpuDraw(on_device, rows + 1, rows, vocab, group or Group())
    asked = Sampler(vocab, Group(), tokens, device=on_device, fused=fused)
    plain = Sampler(vocab, Group(), tokens.cpu())
    for slot, params in enumerate(sampling):
        for sampler in (asked, plain):
            sampler.admit(slot, params, 1)
    slots, positions = np.arange(rows), np.arange(5, rows + 5)
    expected = plain.sample(logits.clone(), slots.astype(np.int64), positions.astype(np.int64)).token_ids.tolist()
    if not fused.takes(slots.astype(np.int32)):
        return None, expected
    where = torch.arange(rows, dtype=torch.int32, device=device), torch.arange(5, rows + 5, device=device)
    places = torch.arange(rows, device=device) * 8
    return fused(logits[:, part].contiguous().to(device), *where, tokens, places).tolist(), expected


def cuda() -> Any:
    from vibe_sgl_lite.model_worker.gpu.device import CudaDevice

    return CudaDevice(torch.device("cuda", 0))


def params(**values: Any) -> ResolvedSampling:
    return ResolvedSampling(**{**DEFAULTS, "end_token_ids": (), "max_new_tokens": 9} | values)


def filtered_rows(rows: int, vocab: int, steps: int) -> tuple[Tensor, list[ResolvedSampling]]:
    """Logits, and parameters with all kinds of filters; two rows in between without. steps: of logits, 0 if any."""
    choose = random.Random(steps)
    generator = torch.Generator().manual_seed(steps)
    logits = torch.randn((rows, vocab), generator=generator) * torch.linspace(0.3, 6.0, rows)[:, None]
    if steps:
        logits = (logits * steps / 8).round() * 8 / steps
    sampling = [
        params(
            temperature=choose.choice([0.3, 0.6, 1.0, 2.5]),
            top_k=choose.choice([1, 2, 5, 20, 50, kernels.KEPT]),
            top_p=choose.choice([1.0, 0.999, 0.95, 0.5, 0.05]),
            min_p=choose.choice([0.0, 0.0, 0.02, 0.3]),
            seed=choose.getrandbits(64),
        )
        for _ in range(rows)
    ]
    sampling[3], sampling[4] = (
        params(temperature=0.0, seed=0),
        params(temperature=0.8, seed=5),
    )  # among others without filters
    return logits, sampling


@pytest.mark.parametrize("steps", [0, 2, 40])  # few make many equals
def test_filters_leave_what_the_sampler_leaves(steps: int, device: torch.device) -> None:
    logits, sampling = filtered_rows(24, 2 * kernels.CHUNK + 77, steps)
    drawn, expected = drawn_by_both(logits, sampling, device)
    assert drawn == expected
    assert len(set(expected)) > len(sampling) // 4


@pytest.mark.parametrize(("ranks", "steps"), [(2, 40), (3, 2)])
def test_ranks_with_filters_draw_the_token_of_one(ranks: int, steps: int, device: torch.device) -> None:
    """Of equals on different ranks, of which few are left, too; a rank may have fewer logits than top-k."""
    rows, vocab = 8, 127 if ranks == 3 else kernels.CHUNK + 1201
    logits, sampling = filtered_rows(rows, vocab, steps)
    logits[5] = float("nan")
    gathered: list[Tensor] = []
    for _ in range(2):
        for rank in range(ranks):
            group = InTurn(rank, gathered, ranks)
            drawn, expected = drawn_by_both(logits, sampling, device, group, spread(vocab, group))
            if len(gathered) > ranks:
                expected[5] = -1
                assert drawn == expected
    assert len({token * ranks // vocab for token in expected if token >= 0}) == ranks


def test_fewer_logits_than_top_k(device: torch.device) -> None:
    logits = torch.full((2, 100), -float("inf"))
    logits[:, [7, 3, 99]] = torch.tensor([1.0, 2.0, 1.0])
    sampling = [params(temperature=5.0, top_k=20, top_p=0.9, seed=seed) for seed in (1, 2)]
    drawn, expected = drawn_by_both(logits, sampling, device)
    assert drawn == expected
    assert set(expected) <= {7, 3, 99}


@pytest.mark.parametrize("other", [{"top_k": kernels.KEPT + 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": True}])
def test_what_the_fused_draw_does_not_take(other: dict[str, Any], device: torch.device) -> None:
    logits = torch.randn((2, 300), generator=torch.Generator().manual_seed(1))
    assert (
        drawn_by_both(logits, [params(temperature=1.0, seed=3), params(temperature=1.0, seed=4, **other)], device)[0]
        is None
    )
