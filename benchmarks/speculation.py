"""Whether speculation changes a token: the whole engine in float32 with and without it, and transformers.

    python benchmarks/speculation.py --prompts 1000
    python benchmarks/speculation.py --prompts 1000 --first 500 --count 100      a part of them

So many prompts of the embedded model greedy, and as many sampled, in every way: temperature, filters, penalties, bias,
stop strings and ids, least lengths, JSON schemas. Text, tokens, logprobs and ends must be the same with
`--speculative-algorithm ngram` and without. The greedy ones without penalties are also held against transformers: one
forward over prompt and output says which token must be next at each place. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/speculation.py` finds the packages

from examples.tiny_model.prompts import CLOSED_TASKS, HARD_TASKS, closed_answer_prompts  # noqa: E402
from examples.tiny_model.stories import story  # noqa: E402
from vibe_sgl_lite import LLM, Output, SamplingParams  # noqa: E402

EMBEDDED = ROOT / "vibe_sgl_lite" / "models" / "tiny"
WORDS = json.dumps({"type": "array", "items": {"enum": ["sun", "moon", "a red ball"]}, "minItems": 4, "maxItems": 8})
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.6, "min_p": 0.05, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    {"temperature": 0.5, "logit_bias": {300: 1.0, 301: -2.0}},
    {"temperature": 0.5, "stop": ("and", ". ", "7")},
    {"temperature": 0.4, "min_new_tokens": 20},
    {"temperature": 0.3, "stop_token_ids": (10, 300, 301)},
    {"temperature": 0.2},
]
GREEDY: list[dict[str, Any]] = [
    {}, {}, {}, {"logprobs": True}, {"stop": ("and", ". ")}, {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
    {"min_new_tokens": 20}, {"ignore_eos": True}, {"stop_token_ids": (10, 300)},
]  # fmt: skip


def make_prompts(count: int) -> list[list[int]]:
    """Questions, with and without thinking, and stories that begin again."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    rng, prompts = Random(11), []
    for number, question in enumerate(closed_answer_prompts(count, 12, CLOSED_TASKS + HARD_TASKS)):
        if number % 3 == 0:
            told = story(rng)
            text = f"{told}\n\n{told[: len(told) // rng.randint(2, 6)]}"
        else:
            thinks = {"enable_thinking": number % 3 == 1, "add_generation_prompt": True, "tokenize": False}
            text = tokenizer.apply_chat_template(question.messages, **thinks)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def make_params(count: int, kinds: Sequence[dict[str, Any]], **common: Any) -> list[SamplingParams]:
    ways = itertools.islice(itertools.cycle(kinds), count)
    return [SamplingParams(seed=seed, max_new_tokens=64, **common | way) for seed, way in enumerate(ways)]


def seen(output: Output) -> tuple[Any, ...]:
    """All that a client sees, but for logprobs' last bits."""
    entries = None if output.logprobs is None else [(e.token_id, round(e.logprob, 3)) for e in output.logprobs]
    return output.text, list(output.token_ids), output.finish_reason, output.matched, entries


def differ_from_transformers(prompts: list[list[int]], outputs: list[Output], first: int) -> int:
    """How many tokens of plain greedy outputs are not the most likely ones."""
    torch.set_num_threads(1)  # short sequences
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    wrong = checked = 0
    ways = itertools.islice(itertools.cycle(GREEDY), first, None)
    for prompt, output, way in zip(prompts, outputs, ways, strict=False):
        if not {"repetition_penalty", "min_new_tokens"}.isdisjoint(way):
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + list(output.token_ids)])).logits[0, len(prompt) - 1 : -1]
        wrong += int((logits.argmax(-1) != torch.tensor(output.token_ids)).sum())
        checked += len(output.token_ids)
    print(f"transformers: {wrong} of {checked} greedy tokens differ", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000, help="greedy ones, and as many sampled (1000)")
    parser.add_argument("--first", type=int, default=0, help="of the prompts that are run, the others are left out (0)")
    parser.add_argument("--count", type=int, help="how many are run (all)")
    parser.add_argument("--running", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    settings: dict[str, Any] = {"dtype": "float32", "max_running_requests": options.running, "tp": options.tp}
    part = slice(options.first, options.prompts if options.count is None else options.first + options.count)
    prompts = make_prompts(options.prompts)[part]
    asked = {
        "greedy": make_params(options.prompts, GREEDY, temperature=0.0)[part],
        "sampled": make_params(options.prompts, SAMPLED)[part],
    }
    results: dict[str, dict[str, list[Output]]] = {}
    for algorithm in ("none", "ngram"):
        with LLM(speculative_algorithm=algorithm, **settings) as llm:
            started = time.perf_counter()
            results[algorithm] = {kind: llm.generate(prompts, params) for kind, params in asked.items()}
            some = make_params(len(prompts[::10]), [{"temperature": 0.3}, {"temperature": 0.0}])
            results[algorithm]["JSON"] = llm.generate(prompts[::10], some, json_schema=WORDS)
            stats = llm.stats()
            print(
                f"{algorithm}: {time.perf_counter() - started:.1f} s, {stats['completion_tokens_total']} tokens in "
                f"{stats['steps_total']} steps, {stats['draft_tokens_total']} drafted, "
                f"{stats['accepted_tokens_total']} accepted",
                flush=True,
            )
    wrong = 0
    for kind, expected in results["none"].items():
        pairs = zip(expected, results["ngram"][kind], strict=True)
        different = [index for index, (plain, other) in enumerate(pairs) if seen(plain) != seen(other)]
        print(f"{kind}: {len(different)} of {len(expected)} differ {different[:10]}", flush=True)
        wrong += len(different)
    wrong += differ_from_transformers(prompts, results["ngram"]["greedy"], options.first)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
