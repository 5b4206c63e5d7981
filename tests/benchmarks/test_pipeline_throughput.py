"""The null rank serves what the scheduler plans, and the benchmark around it reports every process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.internal.null_rank import NullSteps
from tests.scheduler.harness import config, request
from vibe_sgl_lite.runtime.messages import unpack_ids
from vibe_sgl_lite.scheduler.core import Scheduler

ROOT = Path(__file__).resolve().parents[2]


def test_the_null_rank_yields_a_token_for_every_row_at_its_end() -> None:
    scheduler = Scheduler(config(num_pages=200, chunked_prefill_size=16))
    steps = NullSteps(max_slots=8, vocab_size=50, step_s=0.01)
    for uid in range(12):
        scheduler.add(request(uid, range(3 + uid * 4), max_new_tokens=5), 0.0)
    tokens: dict[int, list[int]] = {uid: [] for uid in range(12)}
    while (batch := scheduler.schedule(0.0)) is not None:
        outputs = scheduler.complete(steps.run(batch), 0.0)
        for uid, token in outputs.next_tokens:
            tokens[uid] += unpack_ids(token)
        for output in outputs.tokens:
            tokens[output.uid] += unpack_ids(output.token_ids)
    assert scheduler.idle
    assert all(len(ids) == 5 and all(0 <= token < 50 for token in ids) for ids in tokens.values())


@pytest.mark.parametrize("way", ["--http", pytest.param("--stream", marks=pytest.mark.slow)])
def test_the_benchmark_reports_every_process(way: str) -> None:
    command = [
        sys.executable,
        "benchmarks/internal/pipeline_throughput.py",
        "--rows",
        "4",
        "--step-ms",
        "5",
        way,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    figures = json.loads(run.stdout.splitlines()[-1])
    assert 100 < figures["tokens_per_s"] <= 4 / 0.005 * 1.05
    processes = ["client", "tokenizer_manager", "scheduler", "detokenizer", "null_rank"]
    for process in processes + (["http_server"] if way == "--http" else []):
        assert figures[f"us_{process}"] > 0
