"""The noise against published generators, against its distribution, and for dependence between its keys."""

import math

import numpy as np
import torch

from tests.model_worker.sampling.reference import MASK_32, MASK_64, noise, splitmix
from vibe_sgl_lite.model_worker.sampling.noise import GOLDEN, counters, gumbel, row_keys

SEEDS = [0, 1, 7, 2**63 - 1, -(2**63), -1]


def gumbel_of(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    keys = row_keys(torch.tensor([seed]), torch.tensor([position]))
    return gumbel(keys[:, None], counters(torch.arange(vocab_size)))[0]


def key_giving(high: int) -> int:
    """A key with which token 0's highest 32 bits are `high`: the finaliser run backwards, to a step of 1."""

    def unfold(z: int, shift: int) -> int:
        result = z
        for _ in range(32 // shift + 1):
            result = z ^ (result >> shift)
        return result

    z = unfold(unfold(high, 15) * pow(0x735A2D97, -1, 1 << 32) & MASK_32, 15)
    return unfold(z * pow(0x21F0AAAD, -1, 1 << 32) & MASK_32, 16) - 1 & MASK_32


def test_published_splitmix64() -> None:
    """The generator's well-known outputs for the seed 1234567: keys of position 0 are its finaliser, run twice."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    for number, output in enumerate(published):
        seed = (1234567 + number * GOLDEN) % (1 << 64)
        signed = seed - (1 << 64) if seed >> 63 else seed
        (key,) = row_keys(torch.tensor([signed]), torch.tensor([0])).tolist()
        assert key % (1 << 64) == splitmix(output)


def test_equals_unbounded_integer_arithmetic() -> None:
    for seed in SEEDS:
        for position in (0, 1, 40_959):
            expected = noise(seed & MASK_64, position, 300)
            np.testing.assert_allclose(gumbel_of(seed, position, 300).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_extreme_hashes_stay_finite() -> None:
    keys = torch.tensor([key_giving(0), key_giving(MASK_32)])
    lowest, highest = gumbel(keys, counters(torch.tensor([0]))).tolist()
    assert -math.log(53 * math.log(2)) <= lowest < -math.log(32 * math.log(2))
    assert 32 * math.log(2) < highest <= 53 * math.log(2) * (1 + 1e-15)


def test_one_token_alone_equals_it_among_others() -> None:
    """So a rank's shard, and a short list of candidates, see the noise that the whole vocabulary sees."""
    whole = gumbel_of(5, 9, 151_936)
    keys = row_keys(torch.tensor([5]), torch.tensor([9]))
    for ids in (torch.arange(75_968, 151_936), torch.arange(100, 133), torch.tensor([151_935]), torch.arange(7)):
        assert torch.equal(gumbel(keys[:, None], counters(ids))[0], whole[ids])


def test_distribution_is_gumbel() -> None:
    """Kolmogorov-Smirnov over 1,000,000 variates, along each of the three axes."""
    n = 1_000_000
    ids = gumbel_of(3, 17, n)
    positions = gumbel(row_keys(torch.zeros(n, dtype=torch.int64), torch.arange(n)), counters(torch.tensor([11])))
    seeds = gumbel(row_keys(torch.arange(n), torch.zeros(n, dtype=torch.int64)), counters(torch.tensor([11])))
    for sample in (ids, positions, seeds):
        cdf = torch.exp(-torch.exp(-sample)).sort().values
        gap = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item() + 0.5 / n
        assert gap * math.sqrt(n) < 1.95  # exceeded by chance once in a thousand


def test_neighbouring_keys_are_independent() -> None:
    """Correlation of the uniform variates between neighbours along each axis, and of squares of them."""
    side = 1000
    seeds = torch.arange(side).repeat_interleave(side)
    positions = torch.arange(side).repeat(side)
    keys = row_keys(seeds, positions).view(side, side)
    grid = torch.stack([torch.exp(-torch.exp(-gumbel(keys, counters(torch.tensor(i))))) for i in (20, 21)])
    for power in (1, 2):
        x = grid**power
        x = (x - x.mean()) / x.std()
        pairs = [(x[:, 1:], x[:, :-1]), (x[:, :, 1:], x[:, :, :-1]), (x[0], x[1]), (x[0, 1:, :-1], x[0, :-1, 1:])]
        for a, b in pairs:
            assert abs((a * b).mean().item()) * math.sqrt(a.numel()) < 4


def test_rows_that_share_half_a_key_are_independent() -> None:
    """Their sequences begin at the same place, or have the same step."""
    tokens = counters(torch.arange(200_000))
    choose = torch.Generator().manual_seed(0)
    starts, steps = torch.randint(1 << 32, (2, 12), generator=choose)
    steps -= 1 << 31  # the sign of a key
    keys = torch.cat([steps << 32 | starts[0], steps[0] << 32 | starts[1:]])
    rows = torch.exp(-torch.exp(-gumbel(keys[:, None], tokens)))
    for power in (1, 2):
        x = rows**power
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        for shift in range(3):
            correlations = x[:, shift:] @ x[:, : x.shape[1] - shift].T / x.shape[1]
            correlations -= torch.eye(len(x)) * (shift == 0)
            assert correlations.abs().max() * math.sqrt(x.shape[1]) < 5
