"""What llama.cpp's programs print, as the keys that every engine's result has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import llama_run
from benchmarks.peers import find
from benchmarks.workloads import build

BENCH = """#!{python}
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert a["-m"] == "{gguf}" and a["-t"] == "2" and a["-o"] == "json", a
n_gen, depth = int(a["-n"]), int(a["-d"])
base = dict(build_number=7, build_commit="abc", n_depth=depth)
tests = [dict(base, n_prompt=int(p), n_gen=0, samples_ns=[int(p) * 10**6] * 3) for p in a["-p"].split(",") if p != "0"]
if n_gen:
    assert depth == 128, depth
    tests.append(dict(base, n_prompt=0, n_gen=n_gen, samples_ns=[n_gen * ms * 10**6 for ms in (90, 50, 40)]))
print(json.dumps(tests))
"""
BATCHED = """#!{python}
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert a["-c"] == "4096" and a["--output-format"] == "jsonl", a
pl, tg = int(a["-npl"]), int(a["-ntg"])
print()
print(json.dumps(dict(pp=int(a["-npp"]), tg=tg, pl=pl, t_pp=4.0, t_tg=16.0, t=20.0, speed_tg=pl * tg / 16.0)))
print()
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, object]:
    """Stand-ins for the two programs, which check what they are given, and the job of a peer that was found."""
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    for name, text in (("llama-bench", BENCH), ("llama-batched-bench", BATCHED)):
        program = tmp_path / name
        program.write_text(text.replace("{python}", sys.executable).replace("{gguf}", str(gguf)))
        program.chmod(0o755)
    peer = find("llama.cpp", vllm_python=None, llama_bin=str(tmp_path), gguf=str(gguf))
    return peer.job | {"cores": [0, 1]}


def test_one_request_is_put_together_of_prompt_and_steps(job: dict[str, object]) -> None:
    result = llama_run.measure(job, build("b1", vocab_size=100))
    assert result["ttft_ms"] == {"p50": 128, "p90": 128, "p99": 128}
    assert result["decode_tokens_per_second"] == 20  # 50 ms a step, the median
    assert result["output_tokens_per_second"] == pytest.approx(128 / (0.128 + 127 * 0.05), abs=0.01)
    assert result["prefill_tokens_per_second"] == 1000
    assert result["startup_s"] is None
    assert result["itl_ms"]["p50"] is None
    assert result["peak_rss_mb"] > 0
    assert (result["version"], result["gguf"]) == ("build 7 (abc)", "m.gguf")


def test_requests_of_one_shape_run_together(job: dict[str, object]) -> None:
    result = llama_run.measure(job, build("uniform16", vocab_size=100))
    assert result["output_tokens_per_second"] == pytest.approx(16 * 128 / 20, abs=0.01)
    assert result["decode_tokens_per_second"] == 128
    assert result["ttft_ms"]["p50"] == 4000
    assert result["prefill_tokens_per_second"] == 1000


def test_requests_of_different_shapes_have_only_prefill(job: dict[str, object]) -> None:
    result = llama_run.measure(job, build("mixed16", vocab_size=100))
    assert result["output_tokens_per_second"] is None
    assert result["ttft_ms"]["p50"] is None
    assert result["prefill_tokens_per_second"] == 1000


def test_a_batched_record_is_found_among_other_lines() -> None:
    assert llama_run.batched_record(f"\nnoise\n{json.dumps({'t': 1.0})}\n\n") == {"t": 1.0}
    with pytest.raises(AssertionError, match="0 records"):
        llama_run.batched_record("noise")
