"""What prompt lookup brings, and what it costs where it does not help: one scheduler and one rank on a CPU.

    python benchmarks/internal/speculation.py                                  the embedded model
    python benchmarks/internal/speculation.py --model-path DIR --load-format dummy   forced acceptance, any shape

Each workload is served without and with speculation in turns, greedy or sampled, and the best of each is taken: on a
shared machine only their ratio means something. With --load-format dummy the drafts come from what the plain run gave,
wrong at random, so that each holds with the probability that is asked for; `none` are random prompts and prompt lookup.
Tokens of all runs are compared. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/speculation.py` finds the packages

from benchmarks.internal.in_process import InProcess  # noqa: E402, I001
import torch  # noqa: E402

from examples.tiny_model.prompts import closed_answer_prompts  # noqa: E402
from examples.tiny_model.stories import story  # noqa: E402
from vibe_sgl_lite.model_worker.batch import Drafter  # noqa: E402
from vibe_sgl_lite.model_worker.device_batch import IntArray  # noqa: E402
from vibe_sgl_lite.model_worker.ngram import NgramDrafter  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling  # noqa: E402
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer  # noqa: E402

EMBEDDED = ROOT / "vibe_sgl_lite" / "models" / "tiny"


class Workload(NamedTuple):
    name: str
    prompts: list[list[int]]
    sampling: list[ResolvedSampling]
    drafter: Callable[[list[list[int]]], Drafter]  # of what each prompt gave without
    rows: int


class Forced:
    """What will come, wrong with a fixed probability a token."""

    def __init__(self, most: int, acceptance: float, sequences: Sequence[list[int]], vocab: int) -> None:
        self.most = most
        rng = Random(acceptance)
        self._sequences = [(tokens, [rng.random() < acceptance for _ in tokens]) for tokens in sequences]
        self._of: dict[int, int] = {}
        self._vocab = vocab

    def propose(self, slot: int, tokens: IntArray, most: int) -> list[int]:
        if slot not in self._of:
            known = tokens.tolist()
            self._of[slot] = next(i for i, (s, _) in enumerate(self._sequences) if s[: len(known)] == known)
        sequence, holds = self._sequences[self._of[slot]]
        first = len(tokens)
        pairs = zip(sequence[first : first + most], holds[first : first + most], strict=True)
        return [token if right else (token + 1) % self._vocab for token, right in pairs]

    def release(self, slot: int) -> None:
        self._of.pop(slot, None)


def sampling(count: int, new_tokens: int, **fields: Any) -> list[ResolvedSampling]:
    values: dict[str, Any] = {
        **DEFAULTS,
        "temperature": 0.0,
        "end_token_ids": (),
        "max_new_tokens": new_tokens,
        **fields,
    }
    return [ResolvedSampling(**values | {"seed": seed}) for seed in range(count)]


def embedded_workloads(most: int) -> list[Workload]:
    tokenizer, rng = ChatTokenizer.from_folder(EMBEDDED), Random(5)

    def lookup(_: object) -> Drafter:
        return NgramDrafter(most)

    def chats(*tasks: str) -> list[list[int]]:
        asked = closed_answer_prompts(24, 9, tasks)
        rendered = [tokenizer.apply_chat_template(list(one.messages), enable_thinking=False) for one in asked]
        return [tokenizer.encode_chat(text) for text in rendered]

    told = [story(rng) for _ in range(64)]
    again = [tokenizer.encode_chat(f"{text}\n\n{text[: len(text) // 4]}") for text in told]
    new = [tokenizer.encode_chat(text[:40]) for text in told]
    end = {"end_token_ids": (2041,)}
    return [
        Workload("JSON and tool calls", chats("json", "tool_call"), sampling(24, 64, **end), lookup, 1),
        Workload("copying", chats("copy"), sampling(24, 64, **end), lookup, 1),
        Workload("a story told again", again[:16], sampling(16, 96), lookup, 1),
        Workload("a new story, greedy", new[:16], sampling(16, 96), lookup, 1),
        Workload("a new story, t = 1", new[:16], sampling(16, 96, temperature=1.0), lookup, 1),
        Workload("8 new stories, t = 1", new, sampling(64, 96, temperature=1.0), lookup, 8),
        Workload("16 new stories, t = 1", new, sampling(64, 96, temperature=1.0), lookup, 16),
    ]


def forced_workloads(most: int, vocab: int, rows: Sequence[int], new_tokens: int) -> list[Workload]:
    rng = Random(1)
    made = []
    for count in rows:
        prompts = [[rng.randrange(vocab) for _ in range(128)] for _ in range(count)]
        for acceptance in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):

            def forced(outputs: list[list[int]], acceptance: float = acceptance) -> Drafter:
                return Forced(most, acceptance, outputs, vocab)

            made.append(Workload(f"{count} x {acceptance:.0%}", prompts, sampling(count, new_tokens), forced, count))
        drawn = sampling(count, new_tokens, temperature=1.0)
        made.append(Workload(f"{count} x none", prompts, drawn, lambda _: NgramDrafter(most), count))
    return made


def measure(engine: InProcess, workload: Workload, repeats: int, *, cpu_time: bool) -> dict[str, Any]:
    def clock() -> float:
        return engine.cpu_seconds if cpu_time else engine.seconds

    plain, with_drafts = [], []
    settings: dict[str, Any] = {"max_running_requests": workload.rows, "radix_cache": False}
    expected = engine.serve(workload.prompts, workload.sampling, **settings)
    whole = [prompt + one.tokens for prompt, one in zip(workload.prompts, expected, strict=True)]
    steps, same = engine.steps, 0
    for _ in range(repeats):
        engine.serve(workload.prompts, workload.sampling, **settings)
        plain.append(clock())
        got = engine.serve(workload.prompts, workload.sampling, workload.drafter(whole), **settings)
        with_drafts.append(clock())
        same = sum(one.tokens == other.tokens for one, other in zip(expected, got, strict=True))
    stats = engine.core.stats()
    return {
        "workload": workload.name,
        "tokens": sum(len(one.tokens) for one in expected),
        "same": f"{same}/{len(expected)}",
        "steps": steps,
        "steps_with": engine.steps,
        "drafted": stats["draft_tokens_total"],
        "accepted": stats["accepted_tokens_total"],
        "ratio": round(min(plain) / min(with_drafts), 3),
        "plain_s": round(min(plain), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=EMBEDDED)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--most", type=int, default=12, help="drafts of a row (12)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[1], help="of the dummy model (1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each row of the dummy model (64)")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a busy machine; with one thread")
    parser.add_argument("--only", nargs="*", default=[""], help="workloads with one of these in their name")
    options = parser.parse_args()
    torch.manual_seed(0)
    dummy = options.load_format == "dummy"
    engine = InProcess(options.model_path, getattr(torch, options.dtype), dummy=dummy, pages=600, context=512)
    workloads = (
        forced_workloads(options.most, engine.model.config.vocab_size, options.rows, options.new_tokens)
        if dummy
        else embedded_workloads(options.most)
    )
    results = []
    for workload in workloads:
        if any(part in workload.name for part in options.only):
            results.append(measure(engine, workload, options.repeats, cpu_time=options.cpu_time))
            print(results[-1], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
