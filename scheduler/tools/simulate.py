"""Compare scheduling policies on a simulated engine.

    python -m vibe_sgl_lite.scheduler.tools.simulate --workload fewshot --requests 2000 --rate 4 --plot policies.svg
    python -m vibe_sgl_lite.scheduler.tools.simulate --trace run.trace --calibrate benchmark.json

Prints a table with one line a policy and, last, one JSON line; --plot writes the same as bars, an SVG file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.policies import POLICIES
from vibe_sgl_lite.scheduler.tools.plot import bars
from vibe_sgl_lite.scheduler.tools.simulator import Report, Simulation, StepCost
from vibe_sgl_lite.scheduler.tools.workloads import WORKLOADS, from_trace

COLUMNS = (
    # field, title, format
    ("policy", "policy", "{}"),
    ("output_tokens_per_second", "out tok/s", "{:.0f}"),
    ("ttft_p50_s", "TTFT p50 s", "{:.3f}"),
    ("ttft_p99_s", "TTFT p99 s", "{:.3f}"),
    ("itl_p50_s", "gap p50 s", "{:.4f}"),
    ("itl_p99_s", "gap p99 s", "{:.4f}"),
    ("hit_rate", "hit rate", "{:.3f}"),
    ("retractions", "retracted", "{}"),
    ("fairness", "fairness", "{:.3f}"),
    ("rejected", "rejected", "{}"),
)
PLOTTED = ("output_tokens_per_second", "ttft_p50_s", "ttft_p99_s", "itl_p99_s", "hit_rate", "fairness")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="shared", help="synthetic arrivals (shared)")
    parser.add_argument("--trace", help="take the arrivals of a recorded run instead")
    parser.add_argument("--requests", type=int, default=1000, help="number of requests (1000)")
    parser.add_argument("--rate", type=float, default=4.0, help="mean arrivals a second (4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the arrivals (0)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="with commas (all)")
    parser.add_argument("--pages", type=int, default=2048, help="KV pages (2048)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page (16)")
    parser.add_argument("--max-running-requests", type=int, default=64, help="slots (64)")
    parser.add_argument("--max-queued-requests", type=int, default=1_000_000, help="queue (1000000)")
    parser.add_argument("--chunked-prefill-size", type=int, default=2048, help="prompt tokens a step (2048)")
    parser.add_argument("--disable-radix-cache", action="store_true", help="no sharing between requests")
    parser.add_argument("--disable-overlap", action="store_true", help="one step in flight")
    parser.add_argument("--draft-tokens", type=int, default=0, help="drafts a decode row (0)")
    parser.add_argument("--acceptance", type=float, default=0.7, help="how likely the next draft holds (0.7)")
    parser.add_argument("--calibrate", help="JSON of a benchmark run: take the step costs from its rates")
    parser.add_argument("--decode-rows", type=int, default=16, help="rows of that run's decode steps (16)")
    parser.add_argument("--base-ms", type=float, default=5.0, help="cost of an empty step (5)")
    parser.add_argument("--token-us", type=float, default=50.0, help="cost of a token (50)")
    parser.add_argument("--context-ns", type=float, default=10.0, help="cost of a token attended to (10)")
    parser.add_argument("--plot", help="SVG file to write")
    return parser.parse_args(arguments)


def simulate(args: argparse.Namespace) -> list[Report]:
    """One report a policy. Raises ConfigError, ValueError, OSError."""
    if args.calibrate:
        cost = StepCost.calibrated(last_json_line(Path(args.calibrate)), args.decode_rows)
    else:
        cost = StepCost(args.base_ms / 1e3, args.token_us / 1e6, args.context_ns / 1e9)
    reports = []
    for policy in args.policies.split(","):
        config = SchedulerConfig(
            num_pages=args.pages,
            page_size=args.page_size,
            max_running_requests=args.max_running_requests,
            max_queued_requests=args.max_queued_requests,
            chunked_prefill_size=args.chunked_prefill_size,
            policy=policy,
            radix_cache=not args.disable_radix_cache,
            overlap=not args.disable_overlap,
            base_tokens=cost.base_s / cost.token_s if cost.token_s else 16.0,
            draft_tokens=args.draft_tokens,
        )
        if args.trace:
            arrivals = iter(from_trace(args.trace))
        else:
            arrivals = WORKLOADS[args.workload](args.requests, args.rate, args.seed)
        reports.append(Simulation(config, cost, args.acceptance).run(arrivals))
    return reports


def last_json_line(path: Path) -> dict[str, object]:
    """The JSON object in the last non-empty line of a file, where benchmarks put it."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; it must end in a benchmark's JSON line")
    return msgspec.json.decode(lines[-1], type=dict[str, object])


def table(reports: Sequence[Report]) -> str:
    rows = [[title for _, title, _ in COLUMNS]]
    rows += [[form.format(getattr(report, name)) for name, _, form in COLUMNS] for report in reports]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    began = time.perf_counter()
    try:
        reports = simulate(args)
        sys.stdout.write(table(reports) + "\n")
        if args.plot:
            titles = {name: title for name, title, _ in COLUMNS}
            charts = {titles[name]: {r.policy: float(getattr(r, name)) for r in reports} for name in PLOTTED}
            Path(args.plot).write_text(bars(f"{args.trace or args.workload}: {reports[0].requests} requests", charts))
    except (ConfigError, ValueError, OSError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    seconds = time.perf_counter() - began
    line = {"seconds": round(seconds, 2), "reports": reports}
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
