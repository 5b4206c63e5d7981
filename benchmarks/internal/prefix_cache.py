"""What the radix cache brings: time to the first token, and hit rates under memory pressure for each policy.

    python benchmarks/internal/prefix_cache.py
    python benchmarks/internal/prefix_cache.py --part ttft --model-path ../shared/models/qwen3-0.6b --load-format dummy

ttft    prompts behind a prefix of 2,000 tokens: the first one of its kind computes it (cold), later ones find it (warm)
groups  8 groups of 16 requests, each group behind its own 1,000 tokens, arriving in turns, all at once; the pool holds
        3 groups' prefixes and what runs. One engine a policy. Each run is recorded and simulated with the same
        arrivals and with step costs learned from the recording (scheduler/tools/simulator.py); the recording
        is replayed too

Prints tables and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/prefix_cache.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags, vocab_size_of  # noqa: E402
from benchmarks.workloads import prefill_prompt  # noqa: E402
from vibe_sgl_lite import LLM, AsyncClient, SamplingParams  # noqa: E402
from vibe_sgl_lite.scheduler.cost import Work  # noqa: E402
from vibe_sgl_lite.scheduler.tools.replay import replay  # noqa: E402
from vibe_sgl_lite.scheduler.tools.simulator import Simulation, StepCost  # noqa: E402
from vibe_sgl_lite.scheduler.tools.trace import read_trace  # noqa: E402
from vibe_sgl_lite.scheduler.tools.workloads import from_trace  # noqa: E402

SHARED_LEN = 2000
GROUPS, GROUP_SIZE, GROUP_PREFIX, GROUPS_HELD = 8, 16, 1000, 3
SUFFIX_LEN, OUTPUT_LEN, RUNNING = 20, 12, 4
POLICIES = ("fcfs", "lpm", "dfs-weight")


async def time_to_first_token(client: AsyncClient, ids: list[int]) -> float:
    began = time.perf_counter()
    params = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
    output = await client.generate(input_ids=ids, sampling_params=params)
    assert len(output.token_ids) == 1
    return time.perf_counter() - began


async def measure_ttft(address: str, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token behind new prefixes and behind known ones, in turns; medians and their ratio."""
    cold, warm = [], []
    async with AsyncClient(address=address) as client:
        await time_to_first_token(client, prefill_prompt(vocab_size, 99, 100))
        for round_ in range(rounds):
            prefix = prefill_prompt(vocab_size, round_, SHARED_LEN)
            prompts = [prefix + prefill_prompt(vocab_size, 200 + 3 * round_ + n, SUFFIX_LEN) for n in range(3)]
            cold.append(await time_to_first_token(client, prompts[0]))
            warm += [await time_to_first_token(client, prompt) for prompt in prompts[1:]]
    figures = {"cold_ms": statistics.median(cold) * 1e3, "warm_ms": statistics.median(warm) * 1e3}
    return {name: round(ms, 2) for name, ms in figures.items()} | {
        "cold_over_warm": round(figures["cold_ms"] / figures["warm_ms"], 1)
    }


async def run_groups(address: str, vocab_size: int) -> float:
    """Send every group's requests in turns, at once; seconds until all have ended."""
    params = SamplingParams(max_new_tokens=OUTPUT_LEN, temperature=0, ignore_eos=True)
    prefixes = [prefill_prompt(vocab_size, group, GROUP_PREFIX) for group in range(GROUPS)]
    prompts = [
        prefixes[n % GROUPS] + prefill_prompt(vocab_size, 100 + n, SUFFIX_LEN) for n in range(GROUPS * GROUP_SIZE)
    ]
    async with AsyncClient(address=address) as client:
        began = time.perf_counter()
        outputs = await client.generate(input_ids=prompts, sampling_params=params)
        seconds = time.perf_counter() - began
    assert all(len(output.token_ids) == OUTPUT_LEN for output in outputs)
    return seconds


def measure_policy(policy: str, settings: dict[str, Any], vocab_size: int, trace: Path) -> dict[str, Any]:
    """One engine with a small pool; what it measured, and the same simulated from its trace."""
    page_size = int(settings.get("page_size", 16))
    own = SUFFIX_LEN + OUTPUT_LEN + 2 * page_size  # of a running request, beyond the prefix
    small = {"max_total_tokens": GROUPS_HELD * GROUP_PREFIX + RUNNING * own, "max_running_requests": RUNNING}
    with LLM(**settings | small | {"schedule_policy": policy, "trace": str(trace)}) as llm:
        seconds = asyncio.run(run_groups(llm.address, vocab_size))
        stats = llm.stats()
    _, core = replay(trace)  # raises when a decision differs
    added = core.cost.added
    cost = StepCost(core.cost.seconds(Work(0, 0, 0)), added(Work(1, 0, 0)), added(Work(0, 1, 0)), added(Work(0, 0, 1)))
    report = Simulation(read_trace(trace)[0], cost).run(from_trace(trace))
    return {
        "measured": round(int(stats["cached_tokens_total"]) / int(stats["prompt_tokens_total"]), 4),
        "simulated": round(report.hit_rate, 4),
        "measured_s": round(seconds, 2), "simulated_s": round(report.seconds, 2),
        "retractions": stats["num_retractions"], "simulated_retractions": report.retractions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to the engine, for example --page-size 32.",
    )  # fmt: skip
    parser.add_argument("--part", choices=("ttft", "groups", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=3, help="prefixes of the ttft part (3)")
    options, settings = parse_with_engine_flags(parser)
    vocab_size = vocab_size_of(options.model_path)
    result: dict[str, Any] = {
        "benchmark": "prefix_cache", "model": Path(options.model_path).name, "dtype": options.dtype
    }  # fmt: skip
    if options.part in ("ttft", "all"):
        with LLM(**settings) as llm:
            result["ttft"] = ttft = asyncio.run(measure_ttft(llm.address, vocab_size, options.rounds))
        print(f"time to first token behind {SHARED_LEN} shared tokens, {result['model']} {options.dtype}")
        print(f"  cold {ttft['cold_ms']} ms, warm {ttft['warm_ms']} ms: {ttft['cold_over_warm']} times lower")
    if options.part in ("groups", "all"):
        result["groups"] = {}
        for policy in POLICIES:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure_policy(policy, settings, vocab_size, Path(folder) / "run.trace")
            result["groups"][policy] = figures
        print(f"hit rates, {GROUPS} groups of {GROUP_SIZE} behind {GROUP_PREFIX} tokens, pool for {GROUPS_HELD} groups")
        print(f"{'policy':<12}{'measured':>12}{'simulated':>12}{'measured s':>12}{'simulated s':>12}")
        for policy, f in result["groups"].items():
            print(
                f"{policy:<12}{f['measured']:>12.3f}{f['simulated']:>12.3f}{f['measured_s']:>12}{f['simulated_s']:>12}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
