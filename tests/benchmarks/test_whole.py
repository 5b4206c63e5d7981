"""The offline benchmark as a user runs it: the embedded model, beside transformers, in two rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.peers import ROOT


@pytest.mark.slow
def test_offline_beside_transformers() -> None:
    flags = [
        "--num-requests",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--num-threads",
        "1",
        "--against",
        "transformers",
        "--rounds",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "benchmarks/offline.py", *flags],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any("ours/transformers" in line for line in table)
    result = json.loads(last)
    assert result["output_tokens"] == 8
    for column in (result, result["against"]):
        for key in ("output_tokens_per_second", "decode_tokens_per_second", "prefill_tokens_per_second"):
            low, high = column["spread"][key]
            assert 0 < low <= column[key] <= high
        assert column["startup_s"] > 0
        assert column["peak_rss_mb"] > 0
