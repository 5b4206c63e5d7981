"""Whether surroundings change a bit under `--deterministic`: one scheduler and one rank, embedded model, bf16.

    python benchmarks/internal/determinism.py --requests 2000 --surroundings 20

Each request, greedy or sampled in every way, runs alone; then all of them, with others that are not compared, so many
times in random order, with random numbers of requests and pages, chunk sizes, drafts, cached prefixes and retractions.
Tokens, logprobs and those of the two best tokens at each place must have the same bits. Prints a line a surrounding;
exits with 1 if anything differs, and names it. --first and --count: a part of the requests. --seconds: begin no
surrounding later than so long after the start. Several parts at a time share a GPU well: each waits for its own host
most of the time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/determinism.py` finds the packages

from benchmarks.internal.in_process import InProcess, Sample  # noqa: E402, I001
import torch  # noqa: E402

from benchmarks.speculation import EMBEDDED, make_prompts  # noqa: E402
from vibe_sgl_lite.model_worker.ngram import NgramDrafter  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling  # noqa: E402

END, MOST_DRAFTS = 2041, 6
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    {"temperature": 0.5, "repetition_penalty": 1.05, "logit_bias": {300: 1.0}},
    {"temperature": 0.0, "min_new_tokens": 12},
]


def sampling(number: int, new_tokens: int) -> ResolvedSampling:
    kind = KINDS[number % len(KINDS)] | {"logprobs": True, "top_logprobs": 2, "seed": number}
    return ResolvedSampling(**{**DEFAULTS, "end_token_ids": (END,), "max_new_tokens": new_tokens} | kind)


def promised(sample: Sample) -> list[str]:
    """All bits that are promised, by place; last, how it ended."""
    seen = zip(sample.tokens, sample.logprobs, strict=True)
    return [*(repr((token, entry.logprob, entry.top)) for token, entry in seen), repr(sample.finish)]


def difference(kind: int, before: list[str], now: list[str]) -> str:
    """The first, with the places at which there are others."""
    places = [place for place, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
    first = places[0] if places else min(len(before), len(now)) - 1
    return (
        f"{KINDS[kind]}, {len(before) - 1} tokens, at {places or 'the end'}: {before[first]} alone, {now[first]} here"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--surroundings", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, help="how many of the requests (all)")
    parser.add_argument("--first-surrounding", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    torch.set_num_threads(options.threads)
    prompts, last = make_prompts(options.requests), options.requests
    tested = range(options.first, last if options.count is None else min(last, options.first + options.count))
    on_gpu = options.device == "cuda"
    gpu: dict[str, Any] = {"device": torch.device("cuda", 0), "drafts": MOST_DRAFTS} if on_gpu else {}
    engines = [
        InProcess(EMBEDDED, torch.bfloat16, fixed_order=True, pages=pages, page_size=4, **gpu) for pages in (4000, 160)
    ]
    alone = {}
    for number in tested:
        [sample] = engines[0].serve([prompts[number]], [sampling(number, options.new_tokens)], timed=False)
        alone[number] = promised(sample)
    print(f"{len(alone)} requests have run alone", flush=True)
    wrong = done = 0
    for surrounding in range(options.first_surrounding, options.surroundings):
        if time.perf_counter() > end:
            break
        rng, began = Random(1000 * options.first + surrounding), time.perf_counter()
        order = [*tested, *rng.choices(range(options.requests), k=len(tested) // 4)]
        rng.shuffle(order)
        lengths = dict.fromkeys(tested, options.new_tokens)
        asked = [sampling(number, lengths.get(number, rng.randint(1, 40))) for number in order]
        engine = engines[surrounding % 3 == 2]
        drafts = rng.randint(1, MOST_DRAFTS) if rng.random() < 0.5 else 0
        drafter = NgramDrafter(drafts) if drafts and not on_gpu else None
        samples = engine.serve(
            [prompts[number] for number in order], asked, drafter, drafts=drafts,
            chunked_prefill_size=rng.choice([7, 32, 64, 500]), max_running_requests=rng.choice([2, 5, 16, 32]),
            conservativeness=0.1, base_tokens=2000.0, timed=False, max_queued_requests=len(order) + 1,
        )  # fmt: skip
        pairs = [(number, sample) for number, sample in zip(order, samples, strict=True) if number in alone]
        different = [(number, promised(sample)) for number, sample in pairs if promised(sample) != alone[number]]
        stats = engine.core.stats()
        print(
            f"surrounding {surrounding}: {len(different)} of {len(pairs)} differ; "
            f"{stats['num_retractions']} retractions, {stats['cached_tokens_total']} cached and "
            f"{stats['accepted_tokens_total']} accepted tokens, {stats['steps_total']} steps, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        for number, now in different:
            print(f"  request {number}: {difference(number % len(KINDS), alone[number], now)}", flush=True)
        wrong += len(different)
        done += 1
    print(f"{wrong} differ: {len(alone)} requests from {options.first} on, in {done} surroundings", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
