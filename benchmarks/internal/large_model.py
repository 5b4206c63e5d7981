"""A model that nearly fills a machine: when it is ready, what a step takes, and what all processes take of memory.

    export VIBE_SGL_LITE_CPU_TARGET=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2  # if it is to be held to AVX2
    python benchmarks/internal/large_model.py --model-path ../qwen3-30b-a3b --quantization int4 --max-total-tokens 4096

Weights are made up. What is not known here is the engine's flag. A step's time is what more tokens took longer. Memory
is the largest sum of proportional shares (smaps_rollup) of all processes of the engine, looked at five times a second,
and what each had then. The machine's read rate is measured before and after, by a process of its own. Linux only.
Prints, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/large_model.py` finds the packages

from benchmarks.offline import engine_flags  # noqa: E402
from benchmarks.processes import module_name  # noqa: E402
from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

PROMPT, FEW = 32, 5  # tokens
READ_RATES = "from benchmarks.machine import read_rates; print(*read_rates())"


class Memory:
    """The peak of all processes below this one, in MB, and what each had at that moment."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.2):
            now: dict[str, float] = {}
            for process in psutil.Process().children(recursive=True):
                try:
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    name = f"{module_name(process.cmdline()) or process.name()} {process.pid}"
                except (OSError, psutil.Error):  # it has ended
                    continue
                now[name] = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6
            if sum(now.values()) > sum(self.peak.values()):
                self.peak = now


def read_rate() -> list[float]:
    """GB/s, the best and the median."""
    done = subprocess.run([sys.executable, "-c", READ_RATES], capture_output=True, text=True, check=True, cwd=ROOT)
    rates = [float(word) for word in done.stdout.split()]
    return [max(rates), statistics.median(rates)]


def step_ms(llm: LLM, rows: int, steps: int) -> float:
    """Of decoding `rows` prompts together, which are computed before."""
    prompts = [[(7 * place + row) % 1000 + 5 for place in range(PROMPT)] for row in range(rows)]
    seconds = []
    for tokens in (1, FEW, FEW + steps):
        begin = time.perf_counter()
        llm.generate(input_ids=prompts, sampling_params=SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        seconds.append(time.perf_counter() - begin)
    return round(1e3 * (seconds[2] - seconds[1]) / steps, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder with config.json and the tokenizer")
    parser.add_argument("--steps", type=int, default=32, help="that are timed (32; half of it with 8 rows)")
    options, rest = parser.parse_known_args()
    result: dict[str, Any] = {"read_gb_s_before": read_rate()}
    memory = Memory()
    try:
        begin = time.perf_counter()
        with LLM(model_path=options.model_path, load_format="dummy", **engine_flags(parser, rest)) as llm:
            result["startup_s"] = round(time.perf_counter() - begin, 1)
            print(result, flush=True)
            for rows, steps in ((1, options.steps), (8, options.steps // 2)):
                result[f"step_ms_{rows}_rows"] = step_ms(llm, rows, steps)
            time.sleep(6)  # in which a spare process is made, if there is memory for it
    finally:
        memory.end()
    result["read_gb_s_after"] = read_rate()
    result["peak_mb"] = {name: round(size, 1) for name, size in memory.peak.items()}
    result["peak_gb"] = round(sum(memory.peak.values()) / 1e3, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
