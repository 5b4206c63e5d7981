r"""What drafts bring and what they cost, as users see it: an engine with them and two without, side by side.

    python benchmarks/speculation_speed.py --model-path ../qwen3-0.6b --load-format dummy --rows 1
    python benchmarks/speculation_speed.py --model-path ../qwen3-0.6b --load-format dummy --device cuda --rounds 60 \
        --rows 1 8 64 --max-total-tokens 60000

Text that is never repeated: random ids, drawn at temperature 1, of which a model with random weights makes others.
Text that repeats itself: the same prompts greedily, where such a model soon says one thing for ever. Each is served by
the engines in turns, with so many requests at a time (`benchmarks/paired.py`). The engine learns in the first rounds
what drafts cost, as it is new; the others come later in its life. Prints a line a workload and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/speculation_speed.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags, vocab_size_of  # noqa: E402
from benchmarks.paired import NAMES, OTHER, PLAIN, ratios, turns  # noqa: E402
from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

INPUTS = 128
TEXTS = {"never repeated": 1.0, "repeats itself": 0.0}  # and their temperature


def seconds_of(llm: LLM, prompts: list[list[int]], temperature: float, new_tokens: int) -> float:
    began = time.perf_counter()
    llm.generate(
        input_ids=prompts,
        sampling_params=[
            SamplingParams(temperature=temperature, seed=seed, max_new_tokens=new_tokens, ignore_eos=True)
            for seed in range(len(prompts))
        ],
    )
    return time.perf_counter() - began


def compare(
    engines: Mapping[str, LLM], prompts: list[list[int]], text: str, new_tokens: int, rounds: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for llm in engines.values():
        seconds_of(llm, prompts, TEXTS[text], 8)  # a first one of this shape
    before = engines[OTHER].stats()
    for number in range(rounds):
        for name in turns(number):
            seconds[name].append(seconds_of(engines[name], prompts, TEXTS[text], new_tokens))
    after = engines[OTHER].stats()
    counts = ("steps_total", "draft_tokens_total", "accepted_tokens_total")
    return {
        "text": text,
        "rows": len(prompts),
        **ratios(seconds),
        "plain_tok_s": round(len(prompts) * new_tokens / statistics.median(seconds[PLAIN]), 1),
        **{name: int(after[name]) - int(before[name]) for name in counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to both engines, for example --device cuda.",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="requests at a time (1)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each (128)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="of one row; a half of 8, a quarter of 64; a third of text that repeats itself (6)",
    )
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="(both)")
    parser.add_argument("--speculative-algorithm", default="ngram", help="(ngram)")
    parser.add_argument("--draft-model-path", help="of --speculative-algorithm draft")
    options, settings = parse_with_engine_flags(parser)
    settings |= {"disable_radix_cache": True, "max_running_requests": max(options.rows)}
    settings["speculative_algorithm"] = "none"
    drafts: dict[str, Any] = {"speculative_algorithm": options.speculative_algorithm}
    if options.draft_model_path:
        drafts["draft_model_path"] = options.draft_model_path
    choose, vocab = random.Random(0), vocab_size_of(options.model_path)
    results = []
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        started = pool.map(lambda name: LLM(**settings | (drafts if name == OTHER else {})), NAMES)
        engines = {name: stack.enter_context(llm) for name, llm in zip(NAMES, started, strict=True)}
        for text, rows in itertools.product(options.texts, options.rows):
            prompts = [[choose.randrange(vocab) for _ in range(INPUTS)] for _ in range(rows)]
            fewer = (1 if rows < 8 else 2 if rows < 64 else 4) * (1 if TEXTS[text] else 3)
            rounds = max(1, options.rounds // fewer)
            results.append(compare(engines, prompts, text, options.new_tokens, rounds))
            print(results[-1], flush=True)
    print(json.dumps({"benchmark": "speculation_speed", "model": Path(options.model_path).name, "results": results}))


if __name__ == "__main__":
    main()
