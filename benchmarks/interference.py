"""What a long prompt does to running streams: gaps between their tokens with and without it.

    python benchmarks/interference.py
    python benchmarks/interference.py --prompt-len 4000 --model-path ../shared/models/qwen3-0.6b --load-format dummy

A few streams generate. Their gaps are taken for some seconds (`without`), then from the moment when a long prompt is
sent to its first token (`with`), `--rounds` times, the prompt a new one each time, and at the end without once more.
Prints a table and, last, one JSON line.

The figures to look at are p99 with over p99 without, and both medians. On a busy machine, where waiting for a core is
most of a gap, the CPU time of a rank's mean step says more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/interference.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags, vocab_size_of  # noqa: E402
from benchmarks.report import percentiles  # noqa: E402
from benchmarks.workloads import prefill_prompt  # noqa: E402
from vibe_sgl_lite import LLM, AsyncClient, SamplingParams  # noqa: E402

STREAM_PROMPT_LEN = 64
SETTLED = 30  # tokens of each stream before anything is taken


class Gaps:
    """Seconds between a stream's chunks, taken while `into` is a list."""

    def __init__(self) -> None:
        self.into: list[float] | None = None
        self.chunks: list[int] = []

    async def follow(self, client: AsyncClient, ids: list[int], max_new_tokens: int) -> None:
        index = len(self.chunks)
        self.chunks.append(0)
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0, ignore_eos=True)
        last = time.perf_counter()
        async for _ in client.stream(input_ids=ids, sampling_params=params):
            now = time.perf_counter()
            if self.into is not None:
                self.into.append(now - last)
            last = now
            self.chunks[index] += 1
        raise RuntimeError("a stream ended before the measurement did: make --stream-len larger, or take fewer rounds")


def check(streams: list[asyncio.Task[None]]) -> None:
    """Raises what ended a stream; none ends by itself."""
    for stream in streams:
        if stream.done():
            stream.result()


class RankWork:
    """CPU seconds of rank 0 and steps, summed over spans of time."""

    def __init__(self, client: AsyncClient) -> None:
        children = psutil.Process().children(recursive=True)
        self._rank = next(child for child in children if "vibe_sgl_lite.model_worker.process" in child.cmdline())
        self._client = client
        self.cpu_s = 0.0
        self.steps = 0

    async def add(self, sign: int) -> None:
        """-1 where a span begins, 1 where it ends."""
        times = self._rank.cpu_times()
        self.cpu_s += sign * (times.user + times.system)
        self.steps += sign * int((await self._client.stats())["steps_total"])

    @property
    def step_ms(self) -> float:
        return round(self.cpu_s / self.steps * 1e3, 3)


async def measure(address: str, options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Gaps with and without, and the long prompts' times to the first token, in seconds."""
    alone: list[float] = []
    beside: list[float] = []
    ttft: list[float] = []
    gaps = Gaps()
    async with AsyncClient(address=address) as client:
        work_alone, work_beside = RankWork(client), RankWork(client)
        prompts = [prefill_prompt(vocab_size, 100 + n, STREAM_PROMPT_LEN) for n in range(options.streams)]
        streams = [asyncio.create_task(gaps.follow(client, ids, options.stream_len)) for ids in prompts]
        try:
            while len(gaps.chunks) < options.streams or min(gaps.chunks) < SETTLED:
                await asyncio.sleep(0.05)
                check(streams)
            for round_ in range(options.rounds + 1):  # the streams' contexts grow: alone before and after each prompt
                gaps.into = alone
                await work_alone.add(-1)
                await asyncio.sleep(options.seconds)
                await work_alone.add(1)
                if round_ == options.rounds:
                    break
                prompt = prefill_prompt(vocab_size, round_, options.prompt_len)
                gaps.into = beside
                await work_beside.add(-1)
                began = time.perf_counter()
                await client.generate(
                    input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
                )
                ttft.append(time.perf_counter() - began)
                await work_beside.add(1)
                check(streams)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    cpu = {"without": work_alone.step_ms, "with": work_beside.step_ms}
    return {"without": alone, "with": beside, "ttft": ttft, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to the engine, for example --chunked-prefill-size 2048.",
    )  # fmt: skip
    parser.add_argument("--streams", type=int, default=8, help="running streams (8)")
    parser.add_argument("--stream-len", type=int, default=8000, help="tokens after which a stream would end (8000)")
    parser.add_argument("--prompt-len", type=int, default=16_000, help="tokens of the prompt that arrives (16000)")
    parser.add_argument("--rounds", type=int, default=2, help="how often it arrives (2)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of running streams alone, before each and at the end (4)"
    )
    options, settings = parse_with_engine_flags(parser)
    with LLM(**settings) as llm:
        raw = asyncio.run(measure(llm.address, options, vocab_size_of(options.model_path)))
    figures = {name: percentiles(raw[name]) | {"count": len(raw[name])} for name in ("without", "with")}
    median = figures["without"]["p50"]
    result = {
        "benchmark": "interference", "model": Path(options.model_path).name, "dtype": options.dtype,
        "streams": options.streams, "prompt_tokens": options.prompt_len,
        "gap_ms": {name: f | {"max": round(max(raw[name]) * 1e3, 3)} for name, f in figures.items()},
        "p99_with_over_p50_without": round(figures["with"]["p99"] / median, 2),
        "p99_with_over_p99_without": round(figures["with"]["p99"] / figures["without"]["p99"], 2),
        "cpu_ms_per_step": raw["cpu"],
        "ttft_s": [round(seconds, 2) for seconds in raw["ttft"]],
    }  # fmt: skip
    print(f"{options.streams} streams, {result['model']} {options.dtype}; a prompt of {options.prompt_len} tokens")
    print(f"{'gap, ms':<12}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}{'gaps':>10}")
    for name, f in result["gap_ms"].items():
        print(f"{name:<12}" + "".join(f"{f[key]:>10}" for key in ("p50", "p90", "p99", "max", "count")))
    cpu = raw["cpu"]
    ratio = round(cpu["with"] / cpu["without"], 2)
    print(f"CPU time of a rank's mean step: {cpu['without']} ms without, {cpu['with']} ms with, {ratio} times")
    print(
        f"p99 with / p50 without: {result['p99_with_over_p50_without']}, p99 with / p99 without: "
        f"{result['p99_with_over_p99_without']}; first token of the long prompt after {result['ttft_s']} s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
