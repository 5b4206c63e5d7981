"""Names and peak memory of child processes."""

from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.processes import module_name, peak_mb, peak_memory


def test_processes_are_called_by_their_module() -> None:
    assert module_name(["python", "-P", "-m", "vibe_sgl_lite.runtime.launcher.boot", "scheduler", "--x"]) == "scheduler"
    assert module_name(["python", "-m", "benchmarks.vllm_run"]) == "benchmarks.vllm_run"
    assert module_name(["python", "script.py"]) is None


def test_the_peak_stays_after_memory_was_given_back() -> None:
    code = "import sys; x = b'1' * 50_000_000; del x; print('done', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        assert peak_mb(process) >= (48 if sys.platform == "linux" else 1)
        assert round(peak_mb(process), 1) in peak_memory().values()
        child.communicate()
