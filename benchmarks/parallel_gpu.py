"""Tensor and expert parallelism on two GPUs of one machine: same tokens as one GPU, and throughput beside it.

    python benchmarks/parallel_gpu.py                 all of it, about 6 minutes
    python benchmarks/parallel_gpu.py --steps tokens  only the comparison of tokens

Tokens: the two tiny checkpoints in float32, greedy and seeded, at tp 1, tp 2 and tp 2 ep 2 over NCCL must agree.
Throughput: dummy weights of the 0.6B and of a 4B-like shape in bfloat16 at tp 1 and 2, plain torch attention.
Every engine runs in a process of its own with a time limit, so one that fails costs only its own figures. Prints a
table and, last, one JSON line; exits with 1 if anything failed or differed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/parallel_gpu.py` finds the benchmarks package

DENSE = ROOT / "vibe_sgl_lite" / "models" / "tiny"
MOE = ROOT / "examples" / "tiny_model" / "moe"
STEP_LIMIT_S = 120.0
LOG_LINES = 60  # of a step that failed
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151_645,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
PROMPTS = [
    "Once upon a time there was a small cat",
    "One day, Tom and his friend went to the river. " * 12,
    "12 + 30 =",
    "Sort these numbers: 9 4 71 22 3",
]
ALL_TO_ALL = {"moe_dispatch": "all-to-all"}
TOKEN_STEPS: list[tuple[str, Path, dict[str, Any]]] = [  # the first of a model and dtype is what the others must equal
    ("dense tp 1", DENSE, {"dtype": "float32"}),
    ("dense tp 2", DENSE, {"dtype": "float32", "tp": 2}),
    ("moe tp 1", MOE, {"dtype": "float32"}),
    ("moe tp 2", MOE, {"dtype": "float32", "tp": 2}),
    ("moe tp 2 ep 2", MOE, {"dtype": "float32", "tp": 2, "ep": 2}),
    ("moe tp 2 ep 2 all-to-all", MOE, {"dtype": "float32", "tp": 2, "ep": 2, **ALL_TO_ALL}),
    ("moe bf16 tp 2 ep 2", MOE, {"dtype": "bfloat16", "tp": 2, "ep": 2}),
]
THROUGHPUT_STEPS = [(shape, tp) for shape in SHAPES for tp in (1, 2)]


def tokens(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Greedy and seeded tokens of one engine."""
    from vibe_sgl_lite import LLM, SamplingParams

    with LLM(model_path=str(model), device="cuda", log_level="info", debug_rank_digest=True, **settings) as llm:
        greedy = llm.generate(PROMPTS, SamplingParams(max_new_tokens=48, temperature=0, ignore_eos=True))
        seeded = llm.generate(
            PROMPTS, SamplingParams(max_new_tokens=48, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
        )
        startup = llm.facts["startup"]
    return {"tokens": [output.token_ids for output in greedy + seeded], "startup_s": startup, "text": greedy[0].text}


def throughput(shape: str, tp: int) -> dict[str, Any]:
    """32 requests of 128 in, 128 out, then one alone, on dummy weights."""
    from benchmarks.engine_run import run_engine
    from benchmarks.workloads import build

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE | SHAPES[shape]))
        flags: dict[str, Any] = {
            "model_path": folder, "tokenizer_path": str(DENSE), "load_format": "dummy", "device": "cuda", "tp": tp,
            "context_length": 4096,
        }  # fmt: skip
        vocab_size: int = SHAPE["vocab_size"]  # type: ignore[assignment]
        begin = time.perf_counter()

        def progress(what: str) -> None:
            print(f"[{time.perf_counter() - begin:6.1f} s] {what}", file=sys.stderr, flush=True)

        many = build("custom", vocab_size=vocab_size, num_requests=32, input_len=128, output_len=128)
        result = run_engine(many, vocab_size, flags, progress)
        one = build("custom", vocab_size=vocab_size, num_requests=1, input_len=128, output_len=64)
        alone = run_engine(one, vocab_size, flags, progress)
    return {
        "output_tokens_per_second": result["output_tokens_per_second"],
        "decode_tokens_per_second": result["decode_tokens_per_second"],
        "prefill_tokens_per_second": result["prefill_tokens_per_second"],
        "one_request_tokens_per_second": alone["decode_tokens_per_second"],
        "startup_s": result["startup_s"],
    }


def run_step(step: str, limit_s: float) -> dict[str, Any]:
    """One step in a process of its own: its result, or {"error": ...}, with the end of its log on stderr."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--one", step], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_s)
            error = f"exited with code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the engine's processes die with their parent
            output, _ = process.communicate()
            error = f"not done after {limit_s:.0f} s"
        log.seek(0)
        lines = log.read().splitlines()
    if error:
        print(f"--- {step}: {error}; the end of its log:", *lines[-LOG_LINES:], sep="\n", file=sys.stderr, flush=True)
        return {"error": error}
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{step}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return result


def run_one(step: str) -> dict[str, Any]:
    kind, _, name = step.partition(": ")
    if kind == "tokens":
        _, model, settings = next(entry for entry in TOKEN_STEPS if entry[0] == name)
        return tokens(model, settings)
    shape, _, tp = name.partition(" tp ")
    return throughput(shape, int(tp))


def compare_tokens(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the table: which engine gave the tokens of the first one of its model."""
    lines = []
    for name, model, settings in TOKEN_STEPS:
        base, mine = results[next(first for first, path, _ in TOKEN_STEPS if path == model)], results[name]
        if "error" in mine or "error" in base:
            lines.append(f"{name:28} {mine.get('error', 'nothing to compare with')}")
            continue
        same = sum(a == b for a, b in zip(mine["tokens"], base["tokens"], strict=True))
        mine["same"] = same == len(base["tokens"]) or settings["dtype"] != "float32"  # bf16 only has to run
        lines.append(f"{name:28} {same} of {len(base['tokens'])} outputs as on one GPU in float32")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", choices=("all", "tokens", "throughput"), default="all")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it (540)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_one(options.one)))
        return
    deadline = time.monotonic() + options.limit
    report: dict[str, dict[str, Any]] = {"tokens": {}, "throughput": {}}
    steps = [("tokens", name) for name, _, _ in TOKEN_STEPS] if options.steps != "throughput" else []
    if options.steps != "tokens":
        steps += [("throughput", f"{shape} tp {tp}") for shape, tp in THROUGHPUT_STEPS]
    for kind, name in steps:
        left = deadline - time.monotonic()
        step = f"{kind}: {name}"
        report[kind][name] = run_step(step, min(STEP_LIMIT_S, left)) if left > 10 else {"error": "no time left"}
    if report["tokens"]:
        print(*compare_tokens(report["tokens"]), sep="\n")
    for name, figures in report["throughput"].items():
        print(f"{name:28} " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    failed = [name for part in report.values() for name, result in part.items() if not result.get("same", True)]
    failed += [name for part in report.values() for name, result in part.items() if "error" in result]
    for result in report["tokens"].values():
        result.pop("tokens", None)
    print(json.dumps(report | {"failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
