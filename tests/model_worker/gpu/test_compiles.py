"""The compiler takes what the interpreter takes, for a card that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = (
    "_decode_attention", "_prefill_attention", "_rope_store", "_chain_attention", "_group_attention", "_gemv",
    "_add_rms_norm", "_silu_multiply", "_begin", "_expand_rows", "_chunk_maxima", "_draw", "_product", "_begin_stream",
    "_rank_product", "_all_reduce", "_all_reduce_small", "_all_gather", "_route", "_sort_pairs", "_grouped", "_combine",
    "_choose", "_look_up", "_expand_drafts", "_accept",
    "_grouped_product", "_grouped_gemv", "_plain", "_encode_groups",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_every_kernel_compiles() -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {*KERNELS}
