"""What sampling costs a decode step: a table, and one JSON line at the end.

    python -m benchmarks.internal.sampler [--batch 32] [--vocab 151936] [--threads 2] [--dtype bfloat16]
        [--decode-step-ms 150]

Two kinds of logits: `peaked`, like a trained model's (a few likely tokens, a long tail), and `flat`, like a model with
random weights, whose nucleus holds most of the vocabulary. `--decode-step-ms` is what a step costs without sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.sampler import Sampler
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling

PROMPT, GENERATED = 512, 256

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "temperature + top-k": {"temperature": 0.6, "top_k": 20},
    "temperature + top-k + top-p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "temperature + top-p": {"temperature": 0.8, "top_p": 0.95},
    "temperature + min-p": {"temperature": 0.8, "min_p": 0.05},
    "greedy, all penalties": {
        "temperature": 0.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "all penalties + top-k + top-p": {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "greedy, 5 top_logprobs": {"temperature": 0.0, "logprobs": True, "top_logprobs": 5},
}


def make_logits(kind: str, batch: int, vocab: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab, generator=generator)
    if kind == "peaked":
        logits = logits * 2.5
        likely = torch.randint(vocab, (batch, 40), generator=generator)
        logits.scatter_add_(1, likely, torch.linspace(16.0, 6.0, 40).expand(batch, -1))
    return logits.to(dtype)


def make_step(fields: dict[str, Any], logits: Tensor) -> Callable[[int], None]:
    batch, vocab = logits.shape
    generator = torch.Generator().manual_seed(1)
    length = PROMPT + 2 * GENERATED
    tokens = torch.randint(vocab, (batch, length), generator=generator, dtype=torch.int32)
    sampler = Sampler(vocab, Group(), tokens)
    for slot in range(batch):
        values = {**DEFAULTS, "seed": slot, "end_token_ids": (0,), **fields}
        sampler.admit(slot, ResolvedSampling(**values), PROMPT)
    slots = np.arange(batch)

    def step(n: int) -> None:
        positions = np.full(batch, PROMPT + GENERATED + n % GENERATED)
        output = sampler.sample(logits, slots, positions)
        output.token_ids.tolist()
        if output.logprobs is not None:
            output.logprobs.entries()

    return step


def measure(step: Callable[[int], None], steps: int) -> tuple[float, float]:
    """(best, median) milliseconds a step."""
    for n in range(3):
        step(n)
    times = []
    for n in range(steps):
        begin = time.perf_counter()
        step(n)
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times), float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--decode-step-ms", type=float, default=150.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float]] = {}
    print(f"{'case':32}{'logits':>8}{'best ms':>10}{'median ms':>11}{'of a step':>11}")
    with torch.inference_mode():
        for kind in ("peaked", "flat"):
            logits = make_logits(kind, args.batch, args.vocab, getattr(torch, args.dtype))
            for name, fields in CASES.items():
                best, median = measure(make_step(fields, logits), args.steps)
                results[f"{name} ({kind})"] = {"best_ms": round(best, 2), "median_ms": round(median, 2)}
                print(f"{name:32}{kind:>8}{best:10.2f}{median:11.2f}{median / args.decode_step_ms:11.1%}")
    line = {
        "benchmark": "sampler",
        **vars(args),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "results": results,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
