"""The machine itself: its cores, and its ceilings, measured in the same run as the engine: memory reads, CPU GEMMs.

python benchmarks/machine.py            one line of JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

READ_BYTES = 1 << 30
GEMM_N = 2048


def measure() -> dict[str, float]:
    """read_gb_s: the best of `read_rates`. gemm_*_gflops: 2048^3 products, best of five; all cores."""
    import torch

    rates = {"read_gb_s": max(read_rates())}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(GEMM_N, GEMM_N).to(dtype)
        b = torch.randn(GEMM_N, GEMM_N).to(dtype)
        best = min(_timed(lambda a=a, b=b: a @ b) for _ in range(5))
        rates[f"gemm_{name}_gflops"] = round(2 * GEMM_N**3 / best / 1e9)
    return rates


def read_rates() -> list[float]:
    """GB/s of each of nine sums of 1 GiB of float32; all cores."""
    import torch

    data = torch.ones(READ_BYTES // 4)
    return [round(READ_BYTES / _timed(lambda: data.sum()) / 1e9, 1) for _ in range(9)]


def measure_in_subprocess() -> dict[str, float]:
    """`measure()` in a process of its own, so that the caller neither imports torch nor keeps its memory."""
    script = str(Path(__file__).resolve())
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    rates: dict[str, float] = json.loads(output)
    return rates


def physical_cores() -> list[int]:
    """The first CPU id of each physical core that this process may use; 0 to n - 1 where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(psutil.cpu_count(logical=False) or 1))
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return sorted(first.values())


def _timed(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(measure()))
