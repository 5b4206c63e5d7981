r"""What drafts bring and what they cost, as users see it: whole engines with and without them, side by side.

    python benchmarks/speculation_speed.py --model-path ../qwen3-0.6b --load-format dummy --rows 1
    python benchmarks/speculation_speed.py --model-path ../qwen3-0.6b --load-format dummy --device cuda --rounds 12 \
        --rows 1 8 64 --max-total-tokens 60000

Text that is never repeated: random ids, drawn at temperature 1, of which a model with random weights makes others.
Text that repeats itself: the same prompts greedily, where such a model soon says one thing for ever. Each is served by
the engines in turns, with so many requests at a time. A ratio is the time of the two runs without drafts beside one
with them, over that one's: told are the median, the lowest and the highest; and of the runs without drafts to each
other, which says what the machine is good for. The engine learns in the first round what drafts cost, as it is new; the
others come later in its life. Prints a line a workload and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/speculation_speed.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags, vocab_size_of  # noqa: E402
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


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def compare(
    plain: LLM, other: LLM, prompts: list[list[int]], text: str, new_tokens: int, rounds: int
) -> dict[str, Any]:
    without, drafting = [], []
    before = other.stats()
    seconds_of(plain, prompts, TEXTS[text], new_tokens)  # a first one of this shape
    without.append(seconds_of(plain, prompts, TEXTS[text], new_tokens))
    for _ in range(rounds):
        drafting.append(seconds_of(other, prompts, TEXTS[text], new_tokens))
        without.append(seconds_of(plain, prompts, TEXTS[text], new_tokens))
    after = other.stats()
    beside = [sum(pair) / 2 for pair in itertools.pairwise(without)]
    counts = ("steps_total", "draft_tokens_total", "accepted_tokens_total")
    return {
        "text": text,
        "rows": len(prompts),
        "ratio": spread([one / it for one, it in zip(beside, drafting, strict=True)]),
        "first_ratio": round(beside[0] / drafting[0], 3),
        "plain_ratio": spread([one / it for one, it in itertools.pairwise(without)]),
        "plain_tok_s": round(len(prompts) * new_tokens / statistics.median(without), 1),
        **{name: int(after[name]) - int(before[name]) for name in counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to both engines, for example --device cuda.",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="requests at a time (1)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each (128)")
    parser.add_argument("--rounds", type=int, default=4, help="of one row; a half of 8, a third of 64 (4)")
    parser.add_argument("--speculative-algorithm", default="ngram", help="(ngram)")
    parser.add_argument("--draft-model-path", help="of --speculative-algorithm draft")
    options, settings = parse_with_engine_flags(parser)
    settings |= {"disable_radix_cache": True, "max_running_requests": max(options.rows)}
    drafts: dict[str, Any] = {"speculative_algorithm": options.speculative_algorithm}
    if options.draft_model_path:
        drafts["draft_model_path"] = options.draft_model_path
    choose, vocab = random.Random(0), vocab_size_of(options.model_path)
    results = []
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        started = pool.map(lambda more: LLM(**settings | more), ({"speculative_algorithm": "none"}, drafts))
        plain, other = (stack.enter_context(llm) for llm in started)
        for text, rows in itertools.product(TEXTS, options.rows):
            prompts = [[choose.randrange(vocab) for _ in range(INPUTS)] for _ in range(rows)]
            rounds = max(1, options.rounds // (1 if rows < 8 else 2 if rows < 64 else 3))
            results.append(compare(plain, other, prompts, text, options.new_tokens, rounds))
            print(results[-1], flush=True)
    print(json.dumps({"benchmark": "speculation_speed", "model": Path(options.model_path).name, "results": results}))


if __name__ == "__main__":
    main()
