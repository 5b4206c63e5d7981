"""What share of the least possible time a workload of offline.py reaches, by the rates of the machine in the same run.

    python benchmarks/internal/roofline.py --workloads b1,uniform16,mixed16 --checkouts ../before,. \\
        -- --model-path ../shared/models/qwen3-0.6b --load-format dummy

The least time is that of an engine that loses nothing: the prompts one after another in steps of 512 tokens, then a
step for each further token of the requests, with fewer rows as they end. In a step the matrices take their products, at
the rate of FMAs, or one read of the weights, whichever is longer; then attention takes its products, or one read of
keys and values. Rates are the best of those measured before and after all runs. For dense models in bfloat16 or
float32 on x86-64, with kernels whose products are FMAs in float32 (VIBE_SGL_LITE_CPU_TARGET avx2 or avx512). With
`--quantization` the shares are of the time that the plain dtype would take at least, so they may pass 100 %.

checkouts: of this project, which run in turns, each with its own offline.py. What follows `--` goes to that. Prints a
line a workload and checkout, medians of the rounds, and last one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/roofline.py` finds the packages

from benchmarks.before_after import run  # noqa: E402
from benchmarks.internal.cpu_rates import fma_gflops, read_gb_s  # noqa: E402
from benchmarks.offline import parse  # noqa: E402
from benchmarks.workloads import Workload, build  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402

CHUNK = 512  # tokens of prompts in a step
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Rates:
    """Of the machine, all its threads together."""

    fma_gflops: float
    read_gb_s: float


@dataclass(frozen=True)
class Shape:
    """layer_weights: of one layer's matrices; head_weights: of the head's. heads_width: all query heads side by side.
    kv_bytes: of one token, all layers together. element_bytes: of a weight."""

    layer_weights: int
    head_weights: int
    layers: int
    heads_width: int
    kv_bytes: int
    element_bytes: int

    @classmethod
    def of(cls, model: ModelConfig, element_bytes: int) -> Shape:
        """Of a dense model on one rank."""
        assert not model.is_moe
        width = model.num_attention_heads * model.head_dim
        kv_width = model.num_key_value_heads * model.head_dim
        layer = model.hidden_size * (2 * width + 2 * kv_width + 3 * model.intermediate_size)
        return cls(
            layer, model.hidden_size * model.vocab_size, model.num_hidden_layers, width,
            model.kv_bytes_per_token(1, element_bytes), element_bytes,
        )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """tokens: of all rows; sampled: rows that need logits. pairs: of tokens, one attending to the other. kept: tokens
    whose keys and values are read."""

    tokens: int
    sampled: int
    pairs: int
    kept: int


def steps_of(workload: Workload) -> Iterator[Step]:
    """As an engine that loses nothing would run them."""
    prompts = [len(prompt) for prompt in workload.prompts]
    place, start = 0, 0  # the next prompt's first token that is not computed
    while place < len(prompts):
        tokens = sampled = pairs = kept = 0
        while place < len(prompts) and tokens < CHUNK:
            count = min(CHUNK - tokens, prompts[place] - start)
            end = start + count
            tokens, kept = tokens + count, kept + end
            pairs += count * start + count * (count + 1) // 2
            start = end
            if end == prompts[place]:
                sampled, place, start = sampled + 1, place + 1, 0
        yield Step(tokens, sampled, pairs, kept)
    for more in range(1, max(workload.output_lens)):
        contexts = [
            prompt + more for prompt, output in zip(prompts, workload.output_lens, strict=True) if output > more
        ]
        yield Step(len(contexts), len(contexts), sum(contexts), sum(contexts))


def least_seconds(shape: Shape, workload: Workload, rates: Rates) -> float:
    flops, read = rates.fma_gflops * 1e9, rates.read_gb_s * 1e9
    seconds, layers = 0.0, shape.layer_weights * shape.layers
    for step in steps_of(workload):
        products = 2 * (step.tokens * layers + step.sampled * shape.head_weights)
        weights = layers + (shape.head_weights if step.sampled else 0)
        seconds += max(products / flops, shape.element_bytes * weights / read)
        attended = 4 * shape.heads_width * shape.layers * step.pairs
        seconds += max(attended / flops, shape.kv_bytes * step.kept / read)
    return seconds


def measure(threads: int) -> Rates:
    return Rates(fma_gflops(None, threads), read_gb_s(threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="b1,uniform16,mixed16")
    parser.add_argument("--checkouts", default=str(ROOT), help="folders, commas between (this one)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="of offline.py, after --")
    options = parser.parse_args()
    offline, _ = parse(options.flags)
    if offline.device != "cpu" or offline.dtype not in ELEMENT_BYTES:
        parser.error("only what is multiplied by FMAs in float32 has this roofline: bfloat16 and float32 on a CPU")
    model = ModelConfig.from_folder(offline.model_path)
    shape = Shape.of(model, ELEMENT_BYTES[offline.dtype])
    threads = offline.num_threads or len(os.sched_getaffinity(0))
    checkouts = [Path(name).resolve() for name in options.checkouts.split(",")]
    rates = [measure(threads)]
    speeds: dict[str, dict[str, list[float]]] = {}
    for name in options.workloads.split(","):
        speeds[name] = {str(checkout): [] for checkout in checkouts}
        for number in range(options.rounds):
            for checkout in checkouts[:: 1 if number % 2 == 0 else -1]:
                result = run(checkout, name, options.flags)
                speeds[name][str(checkout)].append(result["output_tokens_per_second"])
    rates.append(measure(threads))
    best = Rates(max(rate.fma_gflops for rate in rates), max(rate.read_gb_s for rate in rates))
    print(f"{best.fma_gflops:.0f} GFLOP/s of FMAs, {best.read_gb_s:.1f} GB/s read, {threads} threads")
    report: dict[str, dict[str, float]] = {}
    for name, found in speeds.items():
        workload = build(name, vocab_size=model.vocab_size, seed=offline.seed)
        least = least_seconds(shape, workload, best)
        report[name] = {"least_s": round(least, 2)}
        for folder, values in found.items():
            seconds = workload.output_tokens / statistics.median(values)
            report[name][folder] = round(least / seconds, 3)
            print(f"{name:10} at least {least:6.2f} s, took {seconds:6.2f}: {least / seconds:5.1%}  {folder}")
    print(json.dumps({"fma_gflops": best.fma_gflops, "read_gb_s": best.read_gb_s, "speeds": speeds, "shares": report}))


if __name__ == "__main__":
    main()
