"""What the processes around the model cost: 256 streams through the whole pipeline, with a rank that only waits.

    python benchmarks/internal/pipeline_throughput.py [--rows 256] [--step-ms 10] [--clients 1] [--stream | --http]

A null rank (benchmarks/internal/null_rank.py) answers each step after --step-ms with pseudo-random tokens. Every other
process is the real one; the client is this program, with one thread of its own. CPU time is that of the time in which
all rows decode, read from the system for each process.

Prints a table and, last, one JSON line: delivered tokens a second, and CPU microseconds a token and process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/...` finds the benchmarks package

from benchmarks.internal.http_streams import read_streams  # noqa: E402
from benchmarks.internal.null_rank import KV_PAGES, STEP_MS  # noqa: E402
from vibe_sgl_lite import AsyncClient, SamplingParams  # noqa: E402
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline  # noqa: E402
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec, pipeline_children  # noqa: E402
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs  # noqa: E402

PROMPT_TOKENS = 32
SETTLE_S = 1.0  # until all rows decode


def children_with_a_null_rank(args: ServerArgs) -> tuple[ChildSpec, ...]:
    return tuple(
        ChildSpec(spec.name, "benchmarks.internal.null_rank", spec.extra) if spec.is_rank else spec
        for spec in pipeline_children(args)
    )


def cpu_seconds() -> dict[str, float]:
    """User and system time of this process and of its children, by name."""
    seconds = {"client": sum(psutil.Process().cpu_times()[:2])}
    for child in psutil.Process().children():
        command = child.cmdline()
        if "vibe_sgl_lite.runtime.launcher.boot" in command:
            module = command[command.index("vibe_sgl_lite.runtime.launcher.boot") + 1]
            name = module.split(".")[-1 if module.startswith("benchmarks") else -2]
            seconds[name] = sum(child.cpu_times()[:2])
    return seconds


async def one(client: AsyncClient, number: int, tokens: int, counter: list[int], *, stream: bool) -> None:
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, seed=number)
    ids = prompt_of(number)
    if not stream:
        output = await client.generate(input_ids=ids, sampling_params=params)
        counter[0] += len(output.token_ids)
        return
    async for chunk in client.stream(input_ids=ids, sampling_params=params):
        counter[0] += len(chunk.token_ids)


def prompt_of(number: int) -> list[int]:
    return [(number * 7 + place) % 200 for place in range(PROMPT_TOKENS)]


async def measure_http(address: str, http: str, rows: int, tokens: int) -> dict[str, float]:
    bodies = [
        {"prompt": prompt_of(number), "max_tokens": tokens, "ignore_eos": True, "seed": number, "stream": True}
        for number in range(rows)
    ]
    async with AsyncClient(address=address) as client:
        work = asyncio.create_task(read_streams(http, "/v1/completions", bodies))
        await asyncio.sleep(SETTLE_S)
        first = int((await client.stats())["completion_tokens_total"])
        first_at, before = time.perf_counter(), cpu_seconds()
        await work
        ended, after = time.perf_counter(), cpu_seconds()
    return figures_of(rows * tokens - first, ended - first_at, before, after)


def figures_of(delivered: float, seconds: float, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    figures = {f"us_{name}": round((after[name] - before[name]) / delivered * 1e6, 2) for name in before}
    return {"tokens_per_s": round(delivered / seconds), **figures}


async def measure(address: str, rows: int, tokens: int, num_clients: int, *, stream: bool) -> dict[str, float]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(address=address)) for _ in range(num_clients)]
        counter = [0]
        began = time.perf_counter()
        streams = (one(clients[n % num_clients], n, tokens, counter, stream=stream) for n in range(rows))
        work = asyncio.gather(*streams)
        await asyncio.sleep(SETTLE_S)
        first, first_at, before = counter[0], time.perf_counter(), cpu_seconds()
        await work
        ended, after = time.perf_counter(), cpu_seconds()
    delivered = counter[0] - first if stream else counter[0] * (ended - first_at) / (ended - began)
    return figures_of(delivered, ended - first_at, before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="streams at once (256)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="what a step takes on the null rank (10)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream (400)")
    parser.add_argument(
        "--clients", type=int, default=1, help="connections that share the streams, in this process (1)"
    )
    parser.add_argument(
        "--stream", action="store_true", help="the client reads every chunk; else only the whole output"
    )
    parser.add_argument("--http", action="store_true", help="over HTTP, streamed")
    options = parser.parse_args()
    os.environ[STEP_MS] = str(options.step_ms)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    args = ServerArgs(
        max_running_requests=options.rows,
        max_total_tokens=KV_PAGES * 16,
        name=f"throughput-{os.getpid()}",
        no_http=not options.http,
        port=0,
    )
    with Pipeline(args, children=children_with_a_null_rank(args)) as pipeline:
        if options.http:
            work = measure_http(pipeline.address, str(pipeline.facts["http"]), options.rows, options.tokens)
        else:
            work = measure(pipeline.address, options.rows, options.tokens, options.clients, stream=options.stream)
        figures = asyncio.run(work)
    print(f"{options.rows} streams, steps of {options.step_ms:g} ms: {figures['tokens_per_s']} tokens/s delivered")
    for name, value in figures.items():
        if name.startswith("us_"):
            print(f"{name.removeprefix('us_'):<24}{value:>9.2f} us a token")
    print(json.dumps(vars(options) | figures))


if __name__ == "__main__":
    main()
