"""What a benchmark run is reduced to: the same keys for every engine, as a table and as one JSON line."""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import msgspec

KEYS = (
    ("output_tokens_per_second", "output tok/s"),
    ("decode_tokens_per_second", "decode tok/s"),
    ("prefill_tokens_per_second", "prefill tok/s"),
)


class Timeline(msgspec.Struct):
    """One request: seconds from the workload's start to its submission, and to each of its tokens."""

    submitted: float
    tokens: list[float]


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of values in seconds, as milliseconds (nearest rank)."""
    ordered = sorted(values) or [0.0]
    pick = {p: ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 90, 99)}
    return {f"p{p}": round(value * 1000, 3) for p, value in pick.items()}


def summarize(timelines: list[Timeline], prefill_seconds: list[float], prefill_len: int) -> dict[str, Any]:
    """Reduce a run.

    output tok/s: all tokens over the time from the first submission to the last token.
    decode tok/s: tokens after the moment when every request had its first token, over that time.
    prefill tok/s: `prefill_len` over the median time to the first token of a lone prompt of that length.
    """
    start = min(t.submitted for t in timelines)
    end = max(t.tokens[-1] for t in timelines)
    all_started = max(t.tokens[0] for t in timelines)
    later = sum(sum(at > all_started for at in t.tokens) for t in timelines)
    gaps = [b - a for t in timelines for a, b in zip(t.tokens, t.tokens[1:], strict=False)]
    return {
        "output_tokens_per_second": round(sum(len(t.tokens) for t in timelines) / (end - start), 2),
        "decode_tokens_per_second": round(later / (end - all_started), 2) if later else 0.0,
        "prefill_tokens_per_second": round(prefill_len / statistics.median(prefill_seconds), 2),
        "ttft_ms": percentiles([t.tokens[0] - t.submitted for t in timelines]),
        "itl_ms": percentiles(gaps),
    }


def print_report(result: dict[str, Any], out: Any = None) -> None:
    """A table with a column per engine, then one JSON line."""
    out = sys.stdout if out is None else out
    columns = {"vibe-sgl-lite": result} | ({result["against_name"]: result["against"]} if "against" in result else {})
    rows = [(label, [f"{c[key]:.1f}" for c in columns.values()]) for key, label in KEYS]
    for key, label in (("ttft_ms", "TTFT ms"), ("itl_ms", "inter-token ms")):
        rows += [(f"{label} {p}", [f"{c[key][p]:.1f}" for c in columns.values()]) for p in ("p50", "p90", "p99")]
    rows.append(("start-up s", [f"{c['startup_s']:.2f}" for c in columns.values()]))
    rows.append(("peak memory MB", [f"{c['peak_rss_mb']:.0f}" for c in columns.values()]))
    processes = {name: mb for c in columns.values() for name, mb in c.get("peak_rss_mb_by_process", {}).items()}
    rows += [
        (f"  {name}", [f"{c.get('peak_rss_mb_by_process', {}).get(name, 0):.0f}" for c in columns.values()])
        for name in processes
    ]
    width = max(len(label) for label, _ in rows)
    head = " ".join(f"{name:>14}" for name in columns)
    print(f"{result['model']} {result['dtype']} {result['device']}, workload {result['workload']}", file=out)
    if "machine" in result:
        print("machine: " + ", ".join(f"{k} {v}" for k, v in result["machine"].items()), file=out)
    print(f"{'':{width}} {head}", file=out)
    for label, values in rows:
        print(f"{label:{width}} " + " ".join(f"{value:>14}" for value in values), file=out)
    print(json.dumps(result), file=out, flush=True)
