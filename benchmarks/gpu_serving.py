r"""Latencies of one GPU under load: first token and gaps between tokens, and what a long prompt does to other streams.

    python benchmarks/gpu_serving.py --model-path qwen3-0.6b --load-format dummy --throughput 20000

Requests of 100 to 1,024 random ids in and out arrive at random (a Poisson process), at 50 % and at 80 % of
`--throughput` output tokens a second (what gpu_offline.py gave), for `--seconds` each. Then 64 streams of 128 tokens in
generate, and a prompt of 16,000 tokens comes: their p99 gap while it is computed, against that before. Prints a table
and, last, one JSON line. Every other --flag VALUE goes to the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/gpu_serving.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags  # noqa: E402
from vibe_sgl_lite import LLM, AsyncClient, SamplingParams  # noqa: E402

HIGHEST_ID = 10_000  # of the prompts
MEAN_OUT = 562
STREAMS, LONG_PROMPT = 64, 16_000


async def stream(client: AsyncClient, ids: list[int], count: int) -> list[float]:
    """When it was sent, and when each of its tokens came; seconds."""
    params = SamplingParams(max_new_tokens=count, temperature=0.6, top_p=1.0, top_k=-1, ignore_eos=True, seed=count)
    times = [time.perf_counter()]
    async for chunk in client.stream(input_ids=ids, sampling_params=params):
        times += [time.perf_counter()] * len(chunk.token_ids)
    return times


async def poisson(client: AsyncClient, rate: float, seconds: float, choose: random.Random) -> dict[str, float]:
    """rate: requests a second."""
    running, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        ids = [choose.randint(0, HIGHEST_ID) for _ in range(choose.randint(100, 1024))]
        running.append(asyncio.create_task(stream(client, ids, choose.randint(100, 1024))))
        await asyncio.sleep(choose.expovariate(rate))
    times = await asyncio.gather(*running)
    first = np.array([t[1] - t[0] for t in times]) * 1e3
    gaps = np.concatenate([np.diff(t[1:]) for t in times]) * 1e3
    took = max(t[-1] for t in times) - min(t[0] for t in times)
    result: dict[str, Any] = {"requests": float(len(times)), "out_tok_s": sum(len(t) - 1 for t in times) / took}
    for share in (50, 90, 99):
        result |= {f"first_p{share}_ms": np.percentile(first, share), f"gap_p{share}_ms": np.percentile(gaps, share)}
    return {name: round(float(value), 2) for name, value in result.items()}


async def long_prompt(client: AsyncClient, choose: random.Random) -> dict[str, float]:
    ids = [[choose.randint(0, HIGHEST_ID) for _ in range(128)] for _ in range(STREAMS)]
    running = [asyncio.create_task(stream(client, prompt, 1500)) for prompt in ids]
    await asyncio.sleep(3.0)
    begin = time.perf_counter()
    await stream(client, [choose.randint(0, HIGHEST_ID) for _ in range(LONG_PROMPT)], 1)
    end = time.perf_counter()
    times = await asyncio.gather(*running)
    gaps = [(late, late - early) for t in times for early, late in pairwise(t[1:])]
    before = np.percentile([gap for at, gap in gaps if begin - 2.0 < at < begin], 99) * 1e3
    during = np.percentile([gap for at, gap in gaps if begin <= at <= end], 99) * 1e3
    named: dict[str, Any] = {"first_ms": (end - begin) * 1e3, "gap_p99_before_ms": before, "gap_p99_during_ms": during}
    return {name: round(float(value), 2) for name, value in (named | {"stretch": during / before}).items()}


async def measure(address: str, options: argparse.Namespace) -> dict[str, Any]:
    choose, results = random.Random(0), dict[str, Any]()
    async with AsyncClient(address=address) as client:
        await asyncio.gather(*(stream(client, [1] * 100, 8) for _ in range(4)))
        for share in (0.5, 0.8):
            rate = share * options.throughput / MEAN_OUT
            results[f"{share:.0%} load"] = await poisson(client, rate, options.seconds, choose)
        results["long prompt"] = await long_prompt(client, choose)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", type=float, default=20_000, help="output tokens a second (20,000)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals at each load (15)")
    options, settings = parse_with_engine_flags(parser)
    with LLM(**settings, device="cuda", disable_radix_cache=True) as llm:
        results = asyncio.run(measure(llm.address, options))
    for name, values in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
