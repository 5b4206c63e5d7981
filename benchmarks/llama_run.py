"""The same workload on llama.cpp's own benchmark programs, in a process of its own: one JSON line on stdout.

Reads a JSON job on stdin (as benchmarks/transformers_run.py does, plus llama_bin, gguf and cores: a thread for each).
One request runs on llama-bench, several of one shape on llama-batched-bench; requests of different lengths have no
program there, so their figures are None, as are those that the programs do not tell (start-up, gaps between tokens).
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.report import percentiles
from benchmarks.workloads import PREFILL_LEN, Workload

REPETITIONS = 3
PAGE = 256  # llama.cpp rounds a sequence's context up to this many tokens
NO_PERCENTILES = {"p50": None, "p90": None, "p99": None}


def bench(job: dict[str, Any], prompts: list[int], generate: int, depth: int) -> list[dict[str, Any]]:
    """llama-bench: one record a prompt length, or one of `generate` tokens after `depth` tokens of context."""
    output = _run(
        job, "llama-bench", "-p", ",".join(map(str, prompts)) or "0", "-n", str(generate), "-d", str(depth),
        "-t", str(len(job["cores"])), "-r", str(REPETITIONS), "-o", "json",
    )  # fmt: skip
    records: list[dict[str, Any]] = json.loads(output)
    return records


def batched_bench(job: dict[str, Any], input_len: int, output_len: int, parallel: int) -> dict[str, Any]:
    """llama-batched-bench: `parallel` sequences of one shape, all prompts first, then all decoding together."""
    context = parallel * -(-(input_len + output_len) // PAGE) * PAGE
    output = _run(
        job, "llama-batched-bench", "-c", str(context), "-npp", str(input_len), "-ntg", str(output_len),
        "-npl", str(parallel), "-t", str(len(job["cores"])), "--output-format", "jsonl",
    )  # fmt: skip
    return batched_record(output)


def batched_record(output: str) -> dict[str, Any]:
    """The one JSON record among the lines that llama-batched-bench prints."""
    records = [line for line in output.splitlines() if line.startswith("{")]
    assert len(records) == 1, f"llama-batched-bench printed {len(records)} records:\n{output}"
    record: dict[str, Any] = json.loads(records[0])
    return record


def seconds(records: list[dict[str, Any]], n_prompt: int, n_gen: int) -> float:
    """The median time of the repetitions of one llama-bench test."""
    (record,) = [r for r in records if (r["n_prompt"], r["n_gen"]) == (n_prompt, n_gen)]
    samples: list[int] = record["samples_ns"]
    return statistics.median(samples) / 1e9


def one_request(records: list[dict[str, Any]], input_len: int, output_len: int) -> dict[str, Any]:
    """A lone request, put together: its prompt's time, then one step for each token after the first."""
    first = seconds(records, input_len, 0)
    step = seconds(records, 0, output_len) / output_len
    return {
        "output_tokens_per_second": round(output_len / (first + (output_len - 1) * step), 2),
        "decode_tokens_per_second": round(1 / step, 2),
        "ttft_ms": percentiles([first]),
        "itl_ms": NO_PERCENTILES,
    }


def same_requests(record: dict[str, Any]) -> dict[str, Any]:
    """Several requests of one shape: no one has a token before all prompts are through."""
    return {
        "output_tokens_per_second": round(record["pl"] * record["tg"] / record["t"], 2),
        "decode_tokens_per_second": round(record["speed_tg"], 2),
        "ttft_ms": percentiles([record["t_pp"]]),
        "itl_ms": NO_PERCENTILES,
    }


def measure(job: dict[str, Any], workload: Workload) -> dict[str, Any]:
    shapes = set(zip(map(len, workload.prompts), workload.output_lens, strict=True))
    input_len, output_len = next(iter(shapes))
    lone = len(workload.prompts) == 1
    records = bench(job, sorted({PREFILL_LEN, input_len}) if lone else [PREFILL_LEN], 0, 0)
    result: dict[str, Any] = {"output_tokens_per_second": None, "decode_tokens_per_second": None}
    result |= {"ttft_ms": NO_PERCENTILES, "itl_ms": NO_PERCENTILES}
    if lone:
        # Decoding starts where the prompt ends: at that depth of context, as in every other engine here.
        result = one_request([*records, *bench(job, [], output_len, input_len)], input_len, output_len)
    elif len(shapes) == 1:
        result = same_requests(batched_bench(job, input_len, output_len, len(workload.prompts)))
    return result | {
        "prefill_tokens_per_second": round(PREFILL_LEN / seconds(records, PREFILL_LEN, 0), 2),
        "startup_s": None,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _RSS_UNIT),
        "version": f"build {records[0]['build_number']} ({records[0]['build_commit']})",
        "gguf": Path(job["gguf"]).name,
    }


_RSS_UNIT = 1024 * 1024 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux


def _run(job: dict[str, Any], program: str, *arguments: str) -> str:
    command = [str(Path(job["llama_bin"]) / program), "-m", job["gguf"], *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    job = json.load(sys.stdin)
    print(json.dumps(measure(job, msgspec.convert(job["workload"], Workload))))


if __name__ == "__main__":
    main()
