"""`vibe-sgl-lite bench`: how fast a running engine serves, or one of its own: requests of random tokens, all at once.

Prints a table and, last, one JSON line. benchmarks/offline.py compares with other engines.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence

import msgspec

from vibe_sgl_lite.runtime.client.async_client import AsyncClient
from vibe_sgl_lite.runtime.client.client import Client
from vibe_sgl_lite.runtime.client.llm import LLM
from vibe_sgl_lite.runtime.errors import ConnectError, VibeError
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams


class Timed(msgspec.Struct):
    """Of one request: seconds to the first token, between tokens, and in all; tokens generated."""

    first: float
    gaps: list[float]
    total: float
    tokens: int


class Report(msgspec.Struct):
    """Times in seconds; p50 and p99 over all requests (first) or all tokens (between)."""

    requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    first_token_p50: float
    first_token_p99: float
    between_p50: float
    between_p99: float


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("vibe-sgl-lite bench", description=__doc__)
    parser.add_argument("--address", help="as the daemon's ready line shows it (default: 'default', else its own)")
    parser.add_argument("--model-path", help="model of an engine of its own")
    parser.add_argument("--num-requests", type=int, default=64, help="requests (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="in flight at once (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of each (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens each generates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("num_requests", "concurrency", "input_len", "output_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    try:
        with _connect(args.address, args.model_path) as client:
            report = asyncio.run(_run(client.address, client.model.vocab_size, args))
    except VibeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for name, value in msgspec.structs.asdict(report).items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        sys.stdout.write(f"{name.replace('_', ' '):22} {shown:>12}\n")
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    return 0


def _connect(address: str | None, model_path: str | None) -> Client:
    if address is not None:
        return Client(address)
    if model_path is None:
        try:
            return Client()
        except ConnectError:
            pass
    sys.stderr.write("starting an engine ...\n")
    return LLM(model_path or "embedded", log_level="warning")


async def _run(address: str, vocab_size: int, args: argparse.Namespace) -> Report:
    draw = random.Random(args.seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.num_requests)]
    params = SamplingParams(max_new_tokens=args.output_len, ignore_eos=True, temperature=0)
    slots = asyncio.Semaphore(args.concurrency)
    async with AsyncClient(address) as client:
        await client.generate(input_ids=prompts[0][:1], sampling_params=SamplingParams(max_new_tokens=2))  # warm
        began = time.perf_counter()
        timed = await asyncio.gather(*(_one(client, prompt, params, slots) for prompt in prompts))
        seconds = time.perf_counter() - began
    output = sum(one.tokens for one in timed)
    gaps = sorted(gap for one in timed for gap in one.gaps)
    firsts = sorted(one.first for one in timed)
    given = args.num_requests * args.input_len
    return Report(
        args.num_requests,
        args.concurrency,
        given,
        output,
        seconds,
        output / seconds,
        (given + output) / seconds,
        statistics.median(firsts),
        _percentile(firsts, 0.99),
        statistics.median(gaps) if gaps else 0.0,
        _percentile(gaps, 0.99),
    )


async def _one(client: AsyncClient, prompt: list[int], params: SamplingParams, slots: asyncio.Semaphore) -> Timed:
    async with slots:
        began = time.perf_counter()
        last, timed = began, Timed(0.0, [], 0.0, 0)
        async for chunk in client.stream(input_ids=prompt, sampling_params=params):
            now = time.perf_counter()
            count = len(chunk.token_ids)
            if not timed.tokens:
                timed.first = now - began
            elif count:
                timed.gaps += [(now - last) / count] * count
            timed.tokens += count
            last = now
        timed.total = last - began
        return timed


def _percentile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
