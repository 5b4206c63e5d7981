"""Tensor and expert parallelism on the GPUs of one machine: the same tokens as one GPU, and what more GPUs bring.

    python benchmarks/parallel_gpu.py --limit 1800                 all of it on two GPUs
    python benchmarks/parallel_gpu.py --ranks 4 --steps tokens,decode --shapes 8B,32B

tokens: the two tiny checkpoints in float32, greedy and drawn, at tp 1, tp N and tp N ep N must agree.
decode: dummy weights of published shapes in bfloat16, at tp 1 and N: milliseconds of a decode step by number of rows
(64 tokens in; steps 49 to 96 after the prompt), and prefill; for experts, beside the floor by bytes of those touched.
kernels: collectives and one layer of experts apart (benchmarks/internal/gpu_parallel.py).
recovery: one rank killed under a stream: seconds that it stands still.

Every engine runs in a process of its own with a time limit, so one that fails costs only its own figures. Prints tables
and, last, one JSON line; exits with 1 if anything failed or differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/parallel_gpu.py` finds the benchmarks package

DENSE = ROOT / "vibe_sgl_lite" / "models" / "tiny"
MOE = ROOT / "examples" / "tiny_model" / "moe"
KERNELS = ROOT / "benchmarks" / "internal" / "gpu_parallel.py"
STEP_LIMIT_S = 150.0
LOG_LINES = 60  # of a step that failed
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151_645,
}


def _shape(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return COMMON | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {  # as Qwen has published them
    "0.6B": _shape(1024, 3072, 28, 16, tied=True),
    "4B": _shape(2560, 9728, 36, 32, tied=True),
    "8B": _shape(4096, 12_288, 36, 32, tied=False),
    "32B": _shape(5120, 25_600, 64, 64, tied=False),
    "30B-A3B": _shape(2048, 6144, 48, 32, tied=False)
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}  # fmt: skip
PROMPTS = [
    "Once upon a time there was a small cat",
    "One day, Tom and his friend went to the river. " * 12,
    "12 + 30 =",
    "Sort these numbers: 9 4 71 22 3",
]
BATCHES = (1, 16, 64, 256)
INPUT, STEPS, PREFILL = 64, 48, (8, 1024)
ROUNDS = 2
SETTINGS: dict[str, Any] = {
    "device": "cuda", "load_format": "dummy", "tokenizer_path": str(DENSE), "context_length": 2048,
    "chunked_prefill_size": 4096, "disable_radix_cache": True, "mem_fraction_static": 0.92,
}  # fmt: skip
ENGINE = {"max_running_requests": 8, "chunked_prefill_size": 256}  # of recovery: what is captured again
NCCL = {"disable_custom_all_reduce": True}
ALL_TO_ALL = {"moe_dispatch": "all-to-all"}


def token_steps(ranks: int) -> list[tuple[str, Path, dict[str, Any]]]:
    """The first one of a model is what the others must equal; in bfloat16 an engine only has to run."""
    tp = {"tp": ranks}
    return [
        ("dense tp 1", DENSE, {}),
        (f"dense tp {ranks}", DENSE, tp),
        (f"dense tp {ranks} nccl", DENSE, tp | NCCL),
        (f"dense tp {ranks} no graphs", DENSE, tp | {"disable_cuda_graph": True}),
        ("moe tp 1", MOE, {}),
        (f"moe tp {ranks}", MOE, tp),
        (f"moe tp {ranks} ep {ranks}", MOE, tp | {"ep": ranks}),
        (f"moe tp {ranks} ep {ranks} all-to-all", MOE, tp | {"ep": ranks} | ALL_TO_ALL),
        (f"moe bf16 tp {ranks} ep {ranks}", MOE, tp | {"ep": ranks, "dtype": "bfloat16"}),
    ]


def decode_steps(shapes: list[str], ranks: int) -> list[tuple[str, str, dict[str, Any]]]:
    steps: list[tuple[str, str, dict[str, Any]]] = []
    for shape in shapes:
        many = {"tp": ranks}
        steps += [(f"{shape} tp 1", shape, {}), (f"{shape} tp {ranks}", shape, many)]
        if "num_experts" in SHAPES[shape]:
            steps.append((f"{shape} tp {ranks} ep {ranks}", shape, many | {"ep": ranks}))
            steps.append((f"{shape} tp {ranks} ep {ranks} all-to-all", shape, many | {"ep": ranks} | ALL_TO_ALL))
        else:
            steps.append((f"{shape} tp {ranks} nccl", shape, many | NCCL))
    return steps


def tokens(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Greedy and drawn tokens of one engine."""
    from vibe_sgl_lite import LLM, SamplingParams

    plain: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True}
    params = [
        SamplingParams(**plain, temperature=0),
        SamplingParams(**plain, temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, seed=5),
        SamplingParams(**plain, temperature=1.0, top_p=0.95, seed=7),
    ]
    fixed = {"max_running_requests": 16, "chunked_prefill_size": 128, "max_total_tokens": 16_384}
    with LLM(model_path=str(model), device="cuda", log_level="info", **{"dtype": "float32"} | fixed | settings) as llm:
        answers = llm.generate(PROMPTS * 3, [each for each in params for _ in PROMPTS])  # more rows than a chain takes
        answers += llm.generate(PROMPTS, params[0])
        answers += llm.generate(PROMPTS, params[1])
        startup = llm.facts["startup"]
    return {"tokens": [answer.token_ids for answer in answers], "startup_s": startup, "text": answers[0].text}


def decode(shape: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a decode step by rows, and prompt tokens a second, on dummy weights."""
    from vibe_sgl_lite import LLM, SamplingParams

    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        begin = time.perf_counter()
        with LLM(model_path=folder, **SETTINGS | settings) as llm:
            result: dict[str, Any] = {"startup_s": time.perf_counter() - begin}

            def seconds(rows: int, length: int, count: int) -> float:
                prompts = [[choose.randrange(10_000) for _ in range(length)] for _ in range(rows)]
                params = [  # of seeds of their own: with one, dummy weights draw the same token for all
                    SamplingParams(
                        max_new_tokens=count, temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, seed=row, ignore_eos=True
                    )
                    for row in range(rows)
                ]
                started = time.perf_counter()
                answers = llm.generate(prompts, params)
                assert all(len(answer.token_ids) == count for answer in answers)
                return time.perf_counter() - started

            seconds(4, INPUT, 8)
            for rows in BATCHES:
                # Two runs that differ in so many steps of all rows: prompts and the rows' ends are in both.
                pairs = [(seconds(rows, INPUT, 1 + STEPS), seconds(rows, INPUT, 1 + 2 * STEPS)) for _ in range(ROUNDS)]
                step = (min(long for _, long in pairs) - min(short for short, _ in pairs)) / STEPS
                result[f"step_ms_{rows}"] = step * 1e3
                result[f"tok_s_{rows}"] = rows / step
                print(f"{shape} {settings} {rows}: {step * 1e3:.3f} ms", file=sys.stderr, flush=True)
            rows, length = PREFILL
            result["prefill_tok_s"] = rows * length / min(seconds(rows, length, 1) for _ in range(3))
    return result


def recovery(shape: str, settings: dict[str, Any], waits: tuple[float, ...]) -> dict[str, Any]:
    """Seconds that a stream stands still when the last rank is killed, after so many seconds without load: at once
    there are no spare processes, and some later there are. All its tokens come."""
    import psutil

    from benchmarks.processes import module_name
    from vibe_sgl_lite import LLM, AsyncClient, SamplingParams

    def kill_last_rank() -> None:
        ranks = []
        for process in psutil.Process().children(recursive=True):
            command = process.cmdline()
            if module_name(command) == "vibe_sgl_lite.model_worker.process" and command[-1] == str(settings["tp"] - 1):
                ranks.append((process.cpu_times().user, process.pid))
        os.kill(max(ranks)[1], signal.SIGKILL)  # a spare has done less

    async def stream(address: str) -> list[float]:
        gaps = []
        async with AsyncClient(address=address) as client:
            for wait in waits:
                await asyncio.sleep(wait)
                params = SamplingParams(max_new_tokens=1500, temperature=0, ignore_eos=True)
                seen, killed, last, longest = 0, False, time.perf_counter(), 0.0
                async for chunk in client.stream(input_ids=[1, 2, 3], sampling_params=params):
                    seen, now = seen + len(chunk.token_ids), time.perf_counter()
                    if killed:  # what was on its way comes first
                        longest = max(longest, now - last)
                    elif seen > 100:
                        kill_last_rank()
                        killed = True
                    last = now
                assert seen == params.max_new_tokens, seen
                gaps.append(longest)
        return gaps

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        with LLM(model_path=folder, **SETTINGS | ENGINE | settings) as llm:
            return {"gaps_s": asyncio.run(stream(llm.address))}


def run_step(name: str, command: list[str], limit_s: float) -> dict[str, Any]:
    """One step in a process of its own: its result, or {"error": ...}, with the end of its log on stderr."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
            error = f"exited with code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the engine's processes die with their parent
            output, _ = process.communicate()
            error = f"not done after {limit_s:.0f} s"
        log.seek(0)
        lines = log.read().splitlines()
    took = time.monotonic() - started
    if error:
        print(
            f"--- {name}: {error}; the end of its log:", *lines[-LOG_LINES:], output[-2000:], sep="\n", file=sys.stderr
        )
        return {"error": error}
    result: Any = json.loads(output.splitlines()[-1])
    print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
    return result if isinstance(result, dict) else {"table": result}


def run_one(step: str, ranks: int, waits: tuple[float, ...]) -> dict[str, Any]:
    kind, _, name = step.partition(": ")
    if kind == "tokens":
        return next(tokens(model, settings) for each, model, settings in token_steps(ranks) if each == name)
    if kind == "recovery":
        return recovery(name, {"tp": ranks}, waits)
    return next(decode(shape, settings) for each, shape, settings in decode_steps([*SHAPES], ranks) if each == name)


def compare_tokens(results: dict[str, dict[str, Any]], ranks: int) -> list[str]:
    """Lines of the table: which engine gave the tokens of the first one of its model."""
    lines = []
    none = {"error": "not run"}
    for name, model, settings in token_steps(ranks):
        first = next(first for first, path, _ in token_steps(ranks) if path == model)
        base, mine = results.get(first, none), results.get(name, none)
        if "error" in mine or "error" in base:
            lines.append(f"{name:32} {mine.get('error', 'nothing to compare with')}")
            continue
        same = sum(a == b for a, b in zip(mine["tokens"], base["tokens"], strict=True))
        mine["same"] = same == len(base["tokens"]) or "dtype" in settings
        lines.append(f"{name:32} {same} of {len(base['tokens'])} outputs as on one GPU in float32")
    return lines


def floor_ms(shape: dict[str, Any], rows: int, read_gb_s: float) -> float:
    """Reading what a decode step of one GPU has to: all weights but the experts, and of these those that are touched
    when tokens choose at random."""
    hidden, layers, dim = shape["hidden_size"], shape["num_hidden_layers"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    plain = shape["vocab_size"] * hidden
    weights = layers * hidden * dim * (2 * heads + 2 * kv_heads)
    if "num_experts" in shape:
        count, chosen = shape["num_experts"], shape["num_experts_per_tok"]
        touched = count * (1 - (1 - chosen / count) ** rows)
        plain += layers * hidden * count
        weights += layers * touched * 3 * hidden * shape["moe_intermediate_size"]
    else:
        weights += layers * 3 * hidden * shape["intermediate_size"]
    size = 1 if "quantization_config" in shape else 2
    return float((2 * plain + size * weights) / read_gb_s / 1e6)


def decode_lines(results: dict[str, dict[str, Any]], read_gb_s: float) -> list[str]:
    lines = [
        f"{'':36}" + "".join(f"{f'ms at {rows}':>22}" for rows in BATCHES) + f"{'prefill tok/s':>15}{'start s':>9}"
    ]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:36}{result['error']}")
            continue
        shape = name.split()[0]
        base = results.get(f"{shape} tp 1", {})
        cells = []
        for rows in BATCHES:
            step = result[f"step_ms_{rows}"]
            if name.endswith("tp 1"):
                beside = f"{floor_ms(SHAPES[shape], rows, read_gb_s) / step:.0%} of floor"
            else:
                beside = f"{base[f'step_ms_{rows}'] / step:.2f} x" if "step_ms_1" in base else ""
            cells.append(f"{step:.3f} {beside:>12}")
        ends = f"{result['prefill_tok_s']:15,.0f}{result['startup_s']:9.1f}"
        lines.append(f"{name:36}" + "".join(f"{cell:>22}" for cell in cells) + ends)
    return lines


def main() -> None:
    kinds = ("tokens", "decode", "kernels", "recovery")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(kinds), help="which of them, with commas between (all)")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs (2)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of decode, with commas between (all)")
    parser.add_argument("--only", default="*", help='names of steps with commas between; "8B*" is all that begin so')
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for all of it (900)")
    parser.add_argument("--waits", default="0.5,12", help="seconds before each kill of recovery (0.5,12)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    ranks, waits = options.ranks, tuple(float(wait) for wait in options.waits.split(","))
    if options.one is not None:
        print(json.dumps(run_one(options.one, ranks, waits)))
        return
    from benchmarks.gpu_offline import measure_card

    deadline = time.monotonic() + options.limit
    card = measure_card() if "decode" in options.steps else {}
    print(card, file=sys.stderr)
    names = {
        "tokens": [name for name, _, _ in token_steps(ranks)],
        "decode": [name for name, _, _ in decode_steps(options.shapes.split(","), ranks)],
        "kernels": [f"collectives {ranks}", "experts"],
        "recovery": ["0.6B"],
    }
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in options.steps.split(","):
        report[kind] = {}
        for name in names[kind]:
            if not any(fnmatchcase(name, each) for each in options.only.split(",")):
                continue
            left, step = deadline - time.monotonic(), f"{kind}: {name}"
            command = [__file__, "--ranks", str(ranks), "--waits", options.waits, "--one", step]
            if kind == "kernels":
                command = [str(KERNELS), name.split()[0], "--ranks", str(ranks)]
            none = {"error": "no time left"}
            report[kind][name] = run_step(step, command, min(STEP_LIMIT_S, left)) if left > 10 else none
    if report.get("tokens"):
        print(*compare_tokens(report["tokens"], ranks), sep="\n")
    if report.get("decode"):
        print(*decode_lines(report["decode"], card["read_gb_s"]), sep="\n")
    for kind in ("kernels", "recovery"):
        for name, result in report.get(kind, {}).items():
            print(name, *result.get("table", [result]), sep="\n  ")
    failed = [name for part in report.values() for name, result in part.items() if not result.get("same", True)]
    failed += [name for part in report.values() for name, result in part.items() if "error" in result]
    for result in report.get("tokens", {}).values():
        result.pop("tokens", None)
    print(json.dumps({"card": card, "ranks": ranks, **report, "failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
