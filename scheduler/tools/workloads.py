"""Synthetic arrivals for the simulator, and arrivals out of a recorded trace. Seeded; made one by one as needed.

poisson    independent prompts of 100-1024 tokens
bursts     the same, in bursts with pauses between
shared     few system prompts, each before many short questions
chats      conversations: every turn's prompt is the whole conversation so far
fewshot    groups of requests behind long common examples, interleaved
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.messages import AddRequest
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling
from vibe_sgl_lite.scheduler.tools.trace import read_trace

MAX_NEW_TOKENS = 512  # what requests ask for; most end earlier, as real ones do
OUTPUT_TOKENS = 150  # mean
FILLER = 7  # the token that simulated ranks generate
_GREEDY = {**DEFAULTS, "seed": 0, "end_token_ids": (), "temperature": 0.0}
_SAMPLING = ResolvedSampling(**{**_GREEDY, "max_new_tokens": MAX_NEW_TOKENS, "stop_token_ids": (1,)})


class Arrival(msgspec.Struct, frozen=True):
    """output_tokens: after so many the simulated request ends, if max_new_tokens has not ended it before."""

    time: float
    message: AddRequest
    output_tokens: int


def _tokens(rng: random.Random, count: int) -> bytes:
    """`count` packed ids, 2 to 65,537, none of them an end token: two random bytes of four, plus 2."""
    raw = bytearray(4 * count)
    raw[1::4] = rng.randbytes(count)
    raw[2::4] = rng.randbytes(count)
    raw[0::4] = b"\x02" * count
    return bytes(raw)


def _output(rng: random.Random) -> int:
    return min(MAX_NEW_TOKENS, 1 + int(rng.expovariate(1 / OUTPUT_TOKENS)))


def _arrival(rng: random.Random, uid: int, time: float, tokens: bytes) -> Arrival:
    return Arrival(time, AddRequest(uid, str(uid), tokens, _SAMPLING), _output(rng))


def poisson(count: int, rate: float, seed: int) -> Iterator[Arrival]:
    rng, time = random.Random(seed), 0.0
    for uid in range(count):
        time += rng.expovariate(rate)
        yield _arrival(rng, uid, time, _tokens(rng, rng.randint(100, 1024)))


def bursts(count: int, rate: float, seed: int) -> Iterator[Arrival]:
    """32 requests within a tenth of the time that they would take at `rate`, then a pause."""
    rng, size = random.Random(seed), 32
    for uid in range(count):
        burst, place = divmod(uid, size)
        time = burst * size / rate + place / (10 * rate)
        yield _arrival(rng, uid, time, _tokens(rng, rng.randint(100, 1024)))


def shared(count: int, rate: float, seed: int) -> Iterator[Arrival]:
    """16 system prompts of 500-2,000 tokens."""
    rng, time = random.Random(seed), 0.0
    prompts = [_tokens(rng, rng.randint(500, 2000)) for _ in range(16)]
    for uid in range(count):
        time += rng.expovariate(rate)
        yield _arrival(rng, uid, time, rng.choice(prompts) + _tokens(rng, rng.randint(20, 200)))


def chats(count: int, rate: float, seed: int) -> Iterator[Arrival]:
    """Conversations of 1-8 turns with 5-60 s between turns; the assistant's turns are what was generated."""
    rng = random.Random(seed)
    turns: list[tuple[float, int, bytes, int]] = []  # time, conversation, prompt so far, turns left
    starts, opened, uid = 0.0, 0, 0
    while uid < count:
        while not turns or turns[0][0] >= starts:
            heapq.heappush(turns, (starts, opened, b"", rng.randint(1, 8)))
            opened += 1
            starts += rng.expovariate(rate / 4.5)
        time, conversation, so_far, left = heapq.heappop(turns)
        arrival = _arrival(rng, uid, time, so_far + _tokens(rng, rng.randint(20, 300)))
        uid += 1
        yield arrival
        if left > 1:
            answer = FILLER.to_bytes(4, "little") * arrival.output_tokens
            after = time + rng.uniform(5, 60)
            heapq.heappush(turns, (after, conversation, arrival.message.token_ids + answer, left - 1))


def fewshot(count: int, rate: float, seed: int) -> Iterator[Arrival]:
    """8 groups with 1,000 tokens in common, their requests taking turns."""
    rng, time = random.Random(seed), 0.0
    prefixes = [_tokens(rng, 1000) for _ in range(8)]
    for uid in range(count):
        time += rng.expovariate(rate)
        yield _arrival(rng, uid, time, prefixes[uid % 8] + _tokens(rng, rng.randint(20, 100)))


def from_trace(path: str | Path) -> list[Arrival]:
    """The arrivals of a recorded run, at their times; each runs to its max_new_tokens. Raises ConfigError."""
    added: list[Any] = [event.args for event in read_trace(path)[1] if event.call == "add"]
    return [Arrival(now - added[0][1], message, message.sampling.max_new_tokens) for message, now in added]


WORKLOADS: Mapping[str, Callable[[int, float, int], Iterator[Arrival]]] = {
    "poisson": poisson,
    "bursts": bursts,
    "shared": shared,
    "chats": chats,
    "fewshot": fewshot,
}
