"""This checkout beside another one of the project: benchmarks/offline.py in turns, medians and their ratios.

    python benchmarks/before_after.py --before ../before --rounds 5 --workloads b1,uniform16,mixed16 \\
        -- --model-path ../shared/models/qwen3-0.6b --load-format dummy

What follows `--` goes to offline.py. Each checkout runs its own script with its own code. A figure is worse when the
ratio is on the wrong side of 1. Prints a table a workload and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Whether more is better.
FIGURES = {
    "output_tokens_per_second": True, "decode_tokens_per_second": True, "prefill_tokens_per_second": True,
    "ttft_ms.p50": False, "itl_ms.p50": False, "itl_ms.p99": False, "startup_s": False, "peak_rss_mb": False,
}  # fmt: skip


def run(root: Path, workload: str, flags: list[str]) -> dict[str, Any]:
    """One run of a checkout's offline.py: its JSON line."""
    command = [sys.executable, "benchmarks/offline.py", "--workload", workload, *flags]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def figures(result: dict[str, Any]) -> dict[str, float]:
    """FIGURES of one run; a dot leads into a table."""
    found: dict[str, float] = {}
    for name in FIGURES:
        value: Any = result
        for key in name.split("."):
            value = value[key]
        found[name] = float(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", default="b1,uniform16,mixed16")
    parser.add_argument("flags", nargs="*", help="of offline.py, after --")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    for workload in options.workloads.split(","):
        runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for number in range(options.rounds):
            order = [("before", options.before.resolve()), ("after", ROOT)]
            for name, root in order if number % 2 == 0 else order[::-1]:
                runs[name].append(figures(run(root, workload, options.flags)))
        report[workload] = {"runs": runs}
        print(f"\n{workload}, medians of {options.rounds} runs in turns")
        for figure, more_is_better in FIGURES.items():
            before, after = (statistics.median(r[figure] for r in runs[name]) for name in ("before", "after"))
            ratio = after / before
            report[workload][figure] = {"before": before, "after": after, "ratio": ratio}
            better = "better is " + ("more" if more_is_better else "less")
            print(f"  {figure:26} {before:10.2f} -> {after:10.2f}   {ratio:5.3f} x  ({better})", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
