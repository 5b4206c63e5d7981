"""Counter-based noise: the Gumbel variate of (seed, position, token id) is a pure function, with no state and no order.

A row's key, 64 bits, is made of its seed and position by SplitMix64's finaliser. A token's 52 bits are made in 32-bit
arithmetic, as there are whole vocabularies of them: number id + 1 of a sequence that begins at the key's low half and
steps by its high half, made odd (a gamma of its own, as in Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), through the finaliser of two multiplications with the least bias that Wellons' "Hash
Prospector" found. Integers wrap on every device, so the bits are the same on CPU and GPU, whole or sharded; only the
two logarithms may differ in the last place of a float64.
"""

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


GOLDEN = _signed(0x9E3779B97F4A7C15, 64)  # 2**64 divided by the golden ratio, odd
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9, 64)
_MULTIPLY_2 = _signed(0x94D049BB133111EB, 64)
_TOKEN_MULTIPLY_1 = _signed(0x21F0AAAD, 32)
_TOKEN_MULTIPLY_2 = _signed(0x735A2D97, 32)
_TOKEN_MULTIPLY_LOW = _signed(0x85EBCA6B, 32)
_BITS_OF_ONE = 0x3FF0000000000000  # 1.0 as a float64


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions: [rows] int64 (seeds are 64 bits in two's complement) -> [rows] int64 keys."""
    return _mix_(_mix_(seeds + GOLDEN) + positions)


def counters(token_ids: Tensor) -> Tensor:
    """int64 ids -> int32 of the same shape: which of a row's numbers they have. Worth keeping for a vocabulary."""
    return (token_ids + 1).to(torch.int32)


def gumbel(keys: Tensor, token_counters: Tensor) -> Tensor:
    """Standard Gumbel noise of each (key, token).

    keys: `row_keys`, token_counters: `counters`; broadcast against each other -> float64 of the broadcast shape.
    Values lie in [-3.6, 36.8]: 52 bits of the hash make the uniform variate.
    """
    low, step = _low_half(keys), _low_half(keys >> 32) | 1
    x = (token_counters * step).add_(low)
    shifted = torch.empty_like(x)
    _fold_(x, 16, shifted).mul_(_TOKEN_MULTIPLY_1)
    _fold_(x, 15, shifted).mul_(_TOKEN_MULTIPLY_2)
    _fold_(x, 15, shifted)
    torch.mul(x, _TOKEN_MULTIPLY_LOW, out=shifted).add_(low)
    shifted.bitwise_right_shift_(12).bitwise_and_((1 << 20) - 1)
    # The bits become the mantissa of a float64 in [1, 2); masks take away copies of the sign.
    bits = x.to(torch.int64).bitwise_and_((1 << 32) - 1).bitwise_left_shift_(20).bitwise_or_(_BITS_OF_ONE)
    uniform = bits.bitwise_or_(shifted).view(torch.float64).sub_(1.0 - 2.0**-53)  # (n + 0.5) / 2**52: not 0 or 1
    return uniform.log_().neg_().log_().neg_()


def _low_half(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    return ((x + (1 << 31)) & ((1 << 32) - 1)).sub_(1 << 31).to(torch.int32)


def _fold_(x: Tensor, shift: int, shifted: Tensor) -> Tensor:
    """x ^= x >> shift, int32 as if it had no sign. shifted: of x's shape, overwritten."""
    torch.bitwise_right_shift(x, shift, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    shifted = torch.empty_like(x)
    for shift, multiply in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, None)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if multiply is not None:
            x.mul_(multiply)
    return x
