"""One model, many engine settings: are the greedy answers the same? A table, and last one JSON line.

    python -m examples.tiny_model.matrix --model vibe_sgl_lite/models/tiny --dtype float32 --dtype bfloat16
    python -m examples.tiny_model.matrix --model examples/tiny_model/moe --parallel

Every variant answers the same held-out prompts, all behind one story that they share. The first one, with a cold cache,
is what the others are compared with. In float32 all answers should be identical; in bfloat16 sums are rounded
differently in differently shaped batches, so an answer that hangs in the balance may differ.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.tiny_model.evaluate import EngineBackend, accuracies, agreement
from examples.tiny_model.prompts import ClosedPrompt, closed_answer_prompts, with_shared_prefix

VARIANTS: dict[str, dict[str, Any]] = {
    "page 16, chunk 512": {},
    "page 1, chunk 16": {"page_size": 1, "chunked_prefill_size": 16},
    "page 64, chunk 64": {"page_size": 64, "chunked_prefill_size": 64},
    "no cache": {"disable_radix_cache": True},
    "no overlap": {"disable_overlap": True},
    "small pool": {"max_total_tokens": 1200, "chunked_prefill_size": 64},
    "batch 64": {"max_running_requests": 64},
    "batch 1": {"max_running_requests": 1},
}
PARALLEL_VARIANTS: dict[str, dict[str, Any]] = {
    "tp 1": {},
    "tp 2": {"tp": 2},
    "tp 4": {"tp": 4},
    "tp 2, ep 2": {"tp": 2, "ep": 2},
    "tp 4, ep 4": {"tp": 4, "ep": 4},
    "tp 4, ep 2": {"tp": 4, "ep": 2},
    "tp 4, ep 2, all-to-all": {"tp": 4, "ep": 2, "moe_dispatch": "all-to-all"},
}


def parallel_variants(model: Path) -> dict[str, dict[str, Any]]:
    """Those that the model can run: expert parallelism needs experts."""
    has_experts = "num_experts" in json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {name: options for name, options in PARALLEL_VARIANTS.items() if has_experts or "ep" not in options}


def run(
    model: Path, dtype: str, prompts: Sequence[ClosedPrompt], thinking: bool, variants: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Share of identical and of right answers, 0 to 1, of every variant."""
    conversations = [prompt.messages for prompt in prompts]
    first: list[str] = []
    figures: dict[str, dict[str, float]] = {}
    for name, options in variants.items():
        backend = EngineBackend(model, dtype, options)
        try:
            for cache in ("cold", "warm") if not first else ("cold",):
                began = time.monotonic()
                texts = backend.answers(conversations, thinking=thinking)
                first = first or texts
                title = name if cache == "cold" else f"{name}, warm"
                scores = accuracies(prompts, texts).values()
                figures[title] = {
                    "identical": agreement(title, texts, first),
                    "right": sum(scores) / len(scores),
                }
                seconds = time.monotonic() - began
                print(f"{dtype}, {title}: {figures[title]} in {seconds:.1f} s", file=sys.stderr, flush=True)
        finally:
            backend.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="may be repeated (float32)")
    parser.add_argument("--prompts", type=int, default=1000, help="number of prompts (default 1000)")
    parser.add_argument("--thinking", action="store_true", help="let the model think before it answers")
    parser.add_argument("--parallel", action="store_true", help="vary tensor and expert parallelism instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default 0)")
    arguments = parser.parse_args()
    prompts = with_shared_prefix(closed_answer_prompts(arguments.prompts, arguments.seed), 1, arguments.seed)
    variants = parallel_variants(arguments.model) if arguments.parallel else VARIANTS
    report: dict[str, Any] = {"model": str(arguments.model), "prompts": arguments.prompts, "figures": {}}
    for dtype in arguments.dtype or ["float32"]:
        report["figures"][dtype] = run(arguments.model, dtype, prompts, arguments.thinking, variants)
    print("| variant | " + " | ".join(f"{dtype}: identical | right" for dtype in report["figures"]) + " |")
    print("|---" * (1 + 2 * len(report["figures"])) + "|")
    for title in next(iter(report["figures"].values())):
        cells = [
            f"{100 * figures[title][what]:.2f} %"
            for figures in report["figures"].values()
            for what in ("identical", "right")
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
