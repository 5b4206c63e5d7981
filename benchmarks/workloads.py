"""The workloads of the offline benchmark: token-id prompts and how many tokens each must generate."""

from __future__ import annotations

import random

import msgspec


class Workload(msgspec.Struct, frozen=True):
    """name, and for each request its prompt's token ids and its number of output tokens (greedy, ignore_eos)."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)


def build(
    name: str, *, vocab_size: int, num_requests: int = 16, input_len: int = 128, output_len: int = 128, seed: int = 0
) -> Workload:
    """`b1`: one request, 128 in, 128 out. `uniform16`: 16 of them. `mixed16`: 16 requests, 100-512 in, 64-128 out.
    `custom`: `num_requests` of `input_len` in and `output_len` out. Ids are random, from a seeded generator."""
    rng = random.Random(seed)
    match name:
        case "b1":
            lengths = [(128, 128)]
        case "uniform16":
            lengths = [(128, 128)] * 16
        case "mixed16":
            lengths = [(rng.randint(100, 512), rng.randint(64, 128)) for _ in range(16)]
        case "custom":
            lengths = [(input_len, output_len)] * num_requests
        case _:
            raise ValueError(f"workload {name!r}: must be b1, uniform16, mixed16 or custom")
    prompts = [[rng.randrange(vocab_size) for _ in range(n)] for n, _ in lengths]
    return Workload(name=name, prompts=prompts, output_lens=[out for _, out in lengths])


PREFILL_LEN = 512  # the separate prefill measurement: one prompt of this length, one token out


def prefill_prompt(vocab_size: int, seed: int, length: int = PREFILL_LEN) -> list[int]:
    """A random prompt of its own for the prefill measurement, so that no cache has it."""
    rng = random.Random(1_000_003 + seed)
    return [rng.randrange(vocab_size) for _ in range(length)]
