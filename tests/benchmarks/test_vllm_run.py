"""The runner of vLLM against a stand-in package with the few names that it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import ROOT
from benchmarks.workloads import build

STAND_IN = {
    "vllm/__init__.py": "from vllm.sampling_params import SamplingParams\n__version__ = '0.0'\n",
    "vllm/sampling_params.py": """
class RequestOutputKind:
    DELTA = "delta"

class SamplingParams:
    def __init__(self, max_tokens, temperature, ignore_eos, output_kind):
        assert (temperature, ignore_eos, output_kind) == (0.0, True, "delta")
        self.max_tokens = max_tokens
""",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": """
class AsyncEngineArgs:
    def __init__(self, **given):
        self.given = given
""",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/async_llm.py": """
import asyncio, os
from types import SimpleNamespace

class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"
        assert args.given["enable_prefix_caching"] is False
        assert args.given["max_model_len"] == 513
        print("something on stdout")
        return cls()

    async def generate(self, prompt, params, name):
        assert len(prompt["prompt_token_ids"]) in (32, 128, 512)
        for size in [1] + [2] * ((params.max_tokens - 1) // 2) + [1] * ((params.max_tokens - 1) % 2):
            await asyncio.sleep(0.001)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5] * size)])

    def shutdown(self):
        print("stopped")
""",
}


def test_the_same_keys_come_from_vllm_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    workload = build("uniform16", vocab_size=100)
    job = {
        "model_folder": "/nowhere", "load_format": "dummy", "dtype": "bfloat16", "seed": 0, "vocab_size": 100,
        "cores": [0, 3],
        "workload": {"name": workload.name, "prompts": workload.prompts, "output_lens": workload.output_lens},
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_run"],
        input=json.dumps(job), capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"PYTHONPATH": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert 0 < result["decode_tokens_per_second"] < 16 * 2000
    assert result["prefill_tokens_per_second"] < 512_000
    assert set(result["ttft_ms"]) == {"p50", "p90", "p99"}
    assert result["peak_rss_mb"] > 0
    assert result["version"] == "0.0"
    assert result["settings"]["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert result["settings"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "stopped" in done.stderr
