"""What a benchmark run is reduced to: the same keys for every engine, as a table and as one JSON line."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import msgspec

OURS = "vibe-sgl-lite"

# The rows of the table: path in an engine's result, label, decimals.
ROWS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("output_tokens_per_second",), "output tok/s", 1),
    (("decode_tokens_per_second",), "decode tok/s", 1),
    (("prefill_tokens_per_second",), "prefill tok/s", 1),
    *((("ttft_ms", p), f"TTFT ms {p}", 1) for p in ("p50", "p90", "p99")),
    *((("itl_ms", p), f"inter-token ms {p}", 1) for p in ("p50", "p90", "p99")),
    (("startup_s",), "start-up s", 2),
    (("peak_rss_mb",), "peak memory MB", 0),
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


def combine(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of an engine's rounds: each figure's median; of more than one round, `spread` has its [min, max].

    A figure that a round lacks (None, or no such key) is None. Anything but figures is the first round's.
    """
    if len(rounds) == 1:
        return rounds[0]
    result: dict[str, Any] = _reduce(rounds, lambda values: round(statistics.median(values), 3))
    figures = {path[0] for path, _, _ in ROWS}
    spread = _reduce([{k: r[k] for k in r if k in figures} for r in rounds], lambda values: [min(values), max(values)])
    return result | {"spread": spread}


def _reduce(values: list[Any], reducer: Callable[[list[float]], Any]) -> Any:
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _reduce([value.get(key) for value in values], reducer) for key in keys}
    if any(value is None for value in values):
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return reducer(values)
    return values[0]


def look_up(result: dict[str, Any], path: tuple[str, ...]) -> Any:
    """What lies under nested keys, or None where there is no such key or a None on the way."""
    value: Any = result
    for key in path:
        value = None if value is None else value.get(key)
    return value


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float | None]:
    """Ours over the peer's, for each row of the table by its label; None where either has no such figure."""
    result: dict[str, float | None] = {}
    for path, label, _ in ROWS:
        mine, other = look_up(ours, path), look_up(peer, path)
        result[label] = round(mine / other, 3) if mine is not None and other else None
    return result


def print_report(result: dict[str, Any], out: Any = None) -> None:
    """A table with a column an engine and one a ratio to each peer, then one JSON line."""
    out = sys.stdout if out is None else out
    peers: dict[str, dict[str, Any]] = result.get("peers", {})
    settings = "".join(f" {name}={value}" for name, value in result.get("settings", {}).items())
    print(f"{result['model']} {result['dtype']} {result['device']}{settings}, workload {result['workload']}", file=out)
    for when, rates in result.get("machine", {}).items():
        print(f"machine {when}: " + ", ".join(f"{k} {v}" for k, v in rates.items()), file=out)
    for name, peer in peers.items():
        print(f"{name}: {peer['version']}" + "".join(f", {peer[key]}" for key in ("gguf",) if key in peer), file=out)
    if result["rounds"] > 1:
        print(f"medians (min..max) of {result['rounds']} rounds, engines taking turns", file=out)
    for line in _table(result, peers):
        print(line, file=out)
    print(json.dumps(result), file=out, flush=True)


def _table(ours: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[str]:
    columns = {OURS: ours} | peers
    over = {name: ratios(ours, peer) for name, peer in peers.items()}
    rows = [["", *columns, *(f"ours/{name}" for name in peers)]]
    for path, label, decimals in ROWS:
        cells = [_cell(look_up(c, path), look_up(c, ("spread", *path)), decimals) for c in columns.values()]
        rows.append([label, *cells, *(_cell(over[name][label], None, 2) for name in peers)])
    for name, megabytes in ours.get("peak_rss_mb_by_process", {}).items():
        rows.append([f"  {name}", _cell(megabytes, None, 0), *([""] * 2 * len(peers))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[1:] = [max(width, 8) for width in widths[1:]]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _cell(value: float | None, spread: list[float] | None, decimals: int) -> str:
    if value is None:
        return "-"
    text = f"{value:.{decimals}f}"
    return text if spread is None else f"{text} ({spread[0]:.{decimals}f}..{spread[1]:.{decimals}f})"
