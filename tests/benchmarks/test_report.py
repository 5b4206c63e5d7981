"""Figures of a run, of several rounds, and the table beside other engines, which may lack some."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from benchmarks.report import OURS, Timeline, combine, look_up, print_report, ratios, summarize


def figures(scale: float) -> dict[str, Any]:
    return {
        "output_tokens_per_second": 10.0 * scale,
        "decode_tokens_per_second": 12.0 * scale,
        "prefill_tokens_per_second": 100.0 * scale,
        "ttft_ms": {"p50": 20.0 / scale, "p90": 30.0, "p99": 40.0},
        "itl_ms": {"p50": 5.0, "p90": 6.0, "p99": 7.0},
        "startup_s": 1.5,
        "peak_rss_mb": 800,
        "version": "1.0",
    }


UNTOLD = {
    "output_tokens_per_second": None,
    "decode_tokens_per_second": None,
    "prefill_tokens_per_second": 50.0,
    "ttft_ms": {"p50": None, "p90": None, "p99": None},
    "itl_ms": {"p50": None, "p90": None, "p99": None},
    "startup_s": None,
    "peak_rss_mb": 400,
    "version": "build 7 (abc)",
    "gguf": "m.gguf",
}


def test_summarize_counts_from_the_first_submission_and_decodes_from_the_last_first_token() -> None:
    timelines = [
        Timeline(submitted=0.0, tokens=[1.0, 2.0, 3.0, 4.0]),
        Timeline(submitted=0.5, tokens=[2.0, 3.0, 5.0]),
    ]
    result = summarize(timelines, [0.5, 2.0, 1.0], 512)
    assert result["output_tokens_per_second"] == pytest.approx(7 / 5)
    assert result["decode_tokens_per_second"] == pytest.approx(round(4 / 3, 2))  # at 3, 4, 3 and 5, over 2..5
    assert result["prefill_tokens_per_second"] == 512
    assert result["ttft_ms"] == {"p50": 1500, "p90": 1500, "p99": 1500}
    assert result["itl_ms"]["p50"] == 1000
    assert result["itl_ms"]["p99"] == 2000


def test_one_round_is_as_it_was() -> None:
    assert combine([figures(1)]) == figures(1)


def test_rounds_give_medians_and_their_spread() -> None:
    result = combine([figures(2), figures(1), figures(4)])
    assert result["output_tokens_per_second"] == 20
    assert result["ttft_ms"] == {"p50": 10, "p90": 30, "p99": 40}
    assert result["version"] == "1.0"
    assert result["spread"]["output_tokens_per_second"] == [10, 40]
    assert result["spread"]["ttft_ms"]["p50"] == [5, 20]
    assert "version" not in result["spread"]


def test_rounds_without_a_figure_have_none_of_it() -> None:
    assert combine([UNTOLD, UNTOLD])["itl_ms"] == UNTOLD["itl_ms"]
    assert combine([UNTOLD, UNTOLD])["spread"]["startup_s"] is None
    assert combine([{"memory": {"a": 1}}, {"memory": {"a": 3, "b": 2}}])["memory"] == {"a": 2, "b": None}


def test_look_up_stops_at_what_is_not_there() -> None:
    assert look_up({"a": {"b": 1}}, ("a", "b")) == 1
    assert look_up({"a": None}, ("a", "b")) is None
    assert look_up({}, ("a", "b")) is None


def test_ratios_are_ours_over_theirs_where_both_tell() -> None:
    result = ratios(figures(2), figures(1))
    assert result["output tok/s"] == 2
    assert result["TTFT ms p50"] == 0.5
    untold = ratios(figures(1), UNTOLD)
    assert untold["output tok/s"] is None
    assert untold["prefill tok/s"] == 2
    assert ratios(figures(1), figures(1) | {"decode_tokens_per_second": 0.0})["decode tok/s"] is None


def report(rounds: int, **more: Any) -> tuple[list[list[str]], dict[str, Any], str]:
    base = {"model": "m", "dtype": "bfloat16", "device": "cpu", "workload": "b1", "rounds": rounds, "settings": {}}
    result = base | combine([figures(1)] * rounds) | {"peak_rss_mb_by_process": {"worker": 700.0}} | more
    out = io.StringIO()
    print_report(result, out)
    *table, last = out.getvalue().splitlines()
    return (
        [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table],
        json.loads(last),
        out.getvalue(),
    )


def test_the_table_has_a_column_an_engine_and_one_a_ratio() -> None:
    lines, result, text = report(
        1, peers={"vllm": figures(0.5), "llama.cpp": UNTOLD}, settings={"quantization": "int4"}
    )
    assert [OURS, "vllm", "llama.cpp", "ours/vllm", "ours/llama.cpp"] in lines
    assert ["output tok/s", "10.0", "5.0", "-", "2.00", "-"] in lines
    assert ["prefill tok/s", "100.0", "50.0", "50.0", "2.00", "2.00"] in lines
    assert ["start-up s", "1.50", "1.50", "-", "1.00", "-"] in lines
    assert ["worker", "700"] in lines
    assert "quantization=int4" in text
    assert "llama.cpp: build 7 (abc), m.gguf" in text
    assert result["peers"]["llama.cpp"]["itl_ms"]["p50"] is None


def test_the_table_of_rounds_shows_spreads_and_both_ceilings() -> None:
    machine = {"before": {"read_gb_s": 20.0}, "after": {"read_gb_s": 18.5}}
    lines, _, text = report(2, peers={"vllm": combine([figures(1), figures(3)])}, machine=machine)
    assert ["output tok/s", "10.0 (10.0..10.0)", "20.0 (10.0..30.0)", "0.50"] in lines
    assert "machine before: read_gb_s 20.0\nmachine after: read_gb_s 18.5\n" in text
    assert "medians (min..max) of 2 rounds" in text


def test_the_table_of_our_engine_alone() -> None:
    lines, result, _ = report(1)
    assert ["output tok/s", "10.0"] in lines
    assert "peers" not in result
