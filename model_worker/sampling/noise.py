"""Counter-based noise: the Gumbel variate of (seed, position, token id) is a pure function, with no state and no order.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) with random access:
output number i of the generator whose state is `key` is mix(key + (i + 1) * GOLDEN). A row's key is made of its seed
and position, i is the token id of the whole vocabulary. Integer arithmetic wraps at 64 bits on every device, so the
bits are the same on CPU and GPU, whole or sharded; only the two logarithms may differ in the last place of a float64.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
_BITS_OF_ONE = 0x3FF0000000000000  # 1.0 as a float64


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions: [rows] int64 (seeds are 64 bits in two's complement) -> [rows] int64 keys."""
    return _mix_(_mix_(seeds + GOLDEN) + positions)


def counters(token_ids: Tensor) -> Tensor:
    """int64 ids -> int64 of the same shape: what a token adds to a row's key. Worth keeping for a whole vocabulary."""
    return (token_ids + 1) * GOLDEN


def gumbel(keys: Tensor, token_counters: Tensor) -> Tensor:
    """Standard Gumbel noise of each (key, token).

    keys: `row_keys`, token_counters: `counters`; broadcast against each other -> float64 of the broadcast shape.
    Values lie in [-3.6, 36.8]: 52 bits of the hash make the uniform variate.
    """
    bits = _mix_(keys + token_counters)
    # The top 52 bits become the mantissa of a float64 in [1, 2); the mask takes away the shift's copies of the sign.
    bits.bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1).bitwise_or_(_BITS_OF_ONE)
    uniform = bits.view(torch.float64).sub_(1.0 - 2.0**-53)  # exactly (n + 0.5) / 2**52: never 0, never 1
    return uniform.log_().neg_().log_().neg_()


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    shifted = torch.empty_like(x)
    for shift, multiply in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, None)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if multiply is not None:
            x.mul_(multiply)
    return x
