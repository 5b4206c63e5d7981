"""Peak memory of each rank at --tp 1, 2, 4 on the CPU, for a checkpoint with the shape of a config.json.

    python benchmarks/rank_memory.py --model-path ../shared/models/qwen3-0.6b

Writes a bfloat16 checkpoint of random weights in a temporary folder (1.2 GB for the 0.6B shape), starts an engine on it
at each degree, has it answer, and reads each rank's VmHWM. What torch and the rest cost without weights is measured the
same way on the tiny model at the same degree and taken off. Linux only. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/rank_memory.py` finds the packages

from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

TINY = ROOT / "vibe_sgl_lite" / "models" / "tiny"
MB = 2**20
# In a process of its own: this one must not keep torch's memory, and forks of it would be larger for it.
WRITE_CHECKPOINT = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def write_checkpoint(model_path: Path, folder: Path) -> int:
    """Random weights for `model_path`/config.json in `folder`, beside its tokenizer; returns their bytes."""
    subprocess.run([sys.executable, "-c", WRITE_CHECKPOINT, str(model_path), str(folder)], check=True)
    for file in model_path.glob("*token*.json"):
        shutil.copy(file, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rank_peaks(model_path: Path, tp: int, prompt_tokens: int) -> list[float]:
    """Peak resident MB of each rank, once it has answered a prompt."""
    with LLM(
        model_path=str(model_path), tp=tp, dtype="bfloat16", device="cpu", num_threads=1, max_total_tokens=1024,
        log_level="warning", max_running_requests=4, context_length=1024,
    ) as llm:  # fmt: skip
        prompt = [token % 1000 for token in range(prompt_tokens)]
        llm.generate(input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=4, ignore_eos=True))
        ranks = [p for p in psutil.Process().children() if "vibe_sgl_lite.model_worker.process" in p.cmdline()]
        return sorted(_peak_mb(rank.pid) for rank in ranks)


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="folder with config.json and the tokenizer")
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 2, 4], help="degrees (1 2 4)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the request that is answered (64)")
    options = parser.parse_args()
    report: dict[str, Any] = {"model": str(options.model_path), "ranks": {}}
    with tempfile.TemporaryDirectory(prefix="rank-memory-") as folder:
        report["weights_mb"] = round(write_checkpoint(options.model_path, Path(folder)) / MB, 1)
        for tp in options.tp:
            empty = max(rank_peaks(TINY, tp, options.prompt_tokens))
            peaks = rank_peaks(Path(folder), tp, options.prompt_tokens)
            report["ranks"][tp] = {
                "peak_mb": [round(peak, 1) for peak in peaks],
                "without_model_mb": round(empty, 1),
                "weights_peak_mb": round(max(peaks) - empty, 1),
            }
    first = report["ranks"][options.tp[0]]
    print(f"checkpoint {report['weights_mb']} MB, bfloat16")
    print(f"| tp | largest rank's peak | of it, model | share of tp {options.tp[0]} |")
    print("|---|---|---|---|")
    for tp, row in report["ranks"].items():
        share = row["weights_peak_mb"] / first["weights_peak_mb"]
        row["share"] = round(share, 3)
        print(f"| {tp} | {max(row['peak_mb']):.0f} MB | {row['weights_peak_mb']:.0f} MB | {100 * share:.1f} % |")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
