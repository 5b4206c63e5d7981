"""The noise against the published generator, against its distribution, and for dependence between its keys."""

import math

import numpy as np
import torch

from tests.model_worker.sampling.reference import MASK_64, noise
from vibe_sgl_lite.model_worker.sampling.noise import GOLDEN, counters, gumbel, row_keys

SEEDS = [0, 1, 7, 2**63 - 1, -(2**63), -1]


def gumbel_of(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    keys = row_keys(torch.tensor([seed]), torch.tensor([position]))
    return gumbel(keys[:, None], counters(torch.arange(vocab_size)))[0]


def key_giving(bits: int) -> int:
    """The key with which token 0's hash is `bits`: the finaliser run backwards."""

    def unshift(z: int, shift: int) -> int:
        result = z
        for _ in range(64 // shift + 1):
            result = z ^ (result >> shift)
        return result

    z = unshift(bits, 31)
    z = z * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK_64
    z = unshift(z, 27)
    z = z * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK_64
    z = (unshift(z, 30) - GOLDEN) & MASK_64
    return z - (1 << 64) if z >> 63 else z


def test_published_splitmix64() -> None:
    """The generator's well-known outputs for the seed 1234567, as the noise they make."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [-math.log(-math.log(((bits >> 12) + 0.5) / 2**52)) for bits in published]
    actual = gumbel(torch.tensor([1234567]), counters(torch.arange(4)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13)


def test_equals_unbounded_integer_arithmetic() -> None:
    for seed in SEEDS:
        for position in (0, 1, 40_959):
            expected = noise(seed & MASK_64, position, 300)
            np.testing.assert_allclose(gumbel_of(seed, position, 300).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_extreme_hashes_stay_finite() -> None:
    keys = torch.tensor([key_giving(0), key_giving(MASK_64)])
    lowest, highest = gumbel(keys, counters(torch.tensor([0]))).tolist()
    assert lowest == -math.log(53 * math.log(2))
    assert math.isclose(highest, 53 * math.log(2))


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
