"""What prompt lookup brings, and what it costs where it does not help: one scheduler and one rank in one process.

    python benchmarks/internal/speculation.py                                  the embedded model, on a CPU
    python benchmarks/internal/speculation.py --device cuda                                      on a GPU
    python benchmarks/internal/speculation.py --device cuda --dtype float32 --identity 300    tokens alone
    python benchmarks/internal/speculation.py --model-path DIR --load-format dummy   forced acceptance, any shape

Each workload is served without speculation, with it, and without once more, by three schedulers at one rank that take
turns with a few requests at a time (`benchmarks/paired.py`). With --load-format dummy the drafts come from what the
plain run gave, wrong at random, so that each holds with the probability that is asked for; `none` are random prompts
and prompt lookup. A life of a scheduler, which has all to learn, serves all prompts --rounds times; there are --repeats
lives. Tokens are compared. Prints a line a workload and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/speculation.py` finds the packages

from benchmarks.internal.in_process import InProcess  # noqa: E402, I001
import msgspec  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from benchmarks.internal.determinism import KINDS  # noqa: E402
from benchmarks.paired import AGAIN, NAMES, OTHER, PLAIN, ratios, turns  # noqa: E402
from benchmarks.speculation import make_prompts  # noqa: E402
from examples.tiny_model.prompts import closed_answer_prompts  # noqa: E402
from examples.tiny_model.stories import story  # noqa: E402
from vibe_sgl_lite.model_worker.batch import Drafter, DraftRow  # noqa: E402
from vibe_sgl_lite.model_worker.device_batch import IntArray  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.speculate import look_up  # noqa: E402
from vibe_sgl_lite.model_worker.ngram import NgramDrafter  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling  # noqa: E402
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer  # noqa: E402

COUNTED = ("steps_total", "draft_tokens_total", "accepted_tokens_total")
EMBEDDED = ROOT / "vibe_sgl_lite" / "models" / "tiny"


class Workload(NamedTuple):
    """drafter: of what each prompt gave without. forced: with what probability drafts hold."""

    name: str
    prompts: list[list[int]]
    sampling: list[ResolvedSampling]
    drafter: Callable[[list[list[int]]], Drafter]
    rows: int
    forced: float | None = None


class Forced:
    """What will come, wrong with a fixed probability a token."""

    def __init__(self, most: int, acceptance: float, sequences: Sequence[list[int]], vocab: int) -> None:
        self.most = most
        rng = Random(acceptance)
        self._sequences = [(tokens, [rng.random() < acceptance for _ in tokens]) for tokens in sequences]
        self._of: dict[int, int] = {}
        self._vocab = vocab

    def propose(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        return [self._propose(*row) for row in rows]

    def _propose(self, slot: int, tokens: IntArray, most: int) -> list[int]:
        if slot not in self._of:
            known = tokens.tolist()
            self._of[slot] = next(i for i, (s, _) in enumerate(self._sequences) if s[: len(known)] == known)
        sequence, holds = self._sequences[self._of[slot]]
        first = len(tokens)
        pairs = zip(sequence[first : first + most], holds[first : first + most], strict=True)
        return [token if right else (token + 1) % self._vocab for token, right in pairs]

    def release(self, slot: int) -> None:
        self._of.pop(slot, None)


class ForcedOnDevice:
    """The same on a GPU, in place of what looks drafts up and accepts them (model_worker/gpu/kernels/speculate.py):
    any drafts, of which each position's holds or not by chance. In bf16 what comes is not what came without drafts."""

    def __init__(self, length: int, device: torch.device) -> None:
        self._holds = torch.zeros(length, dtype=torch.int32, device=device)
        self._proposes = torch.zeros(1, dtype=torch.int32, device=device)

    def expect(self, acceptance: float | None) -> None:
        """None: nothing is proposed."""
        self._proposes.fill_(acceptance is not None)
        generator = torch.Generator().manual_seed(int(1000 * (acceptance or 0)))
        self._holds.copy_(torch.rand(len(self._holds), generator=generator) < (acceptance or 0))

    def propose(
        self, slots: torch.Tensor, known: torch.Tensor, rooms: torch.Tensor, lengths: torch.Tensor,
        tokens: torch.Tensor, row_lengths: torch.Tensor, drafted: torch.Tensor, most: int,
    ) -> None:  # fmt: skip
        look_up(slots, known, rooms, lengths, tokens, row_lengths, drafted, most)  # for the time that it takes
        _propose[(len(slots),)](rooms, row_lengths, drafted, self._proposes)

    def accept(
        self, sampled: torch.Tensor, token_ids: torch.Tensor, slots: torch.Tensor, row_lengths: torch.Tensor,
        drafted: torch.Tensor, lengths: torch.Tensor, result: torch.Tensor,
    ) -> None:  # fmt: skip
        rows, count = len(slots), len(token_ids) // len(slots)
        _accept[(rows,)](
            sampled, slots, row_lengths, drafted, lengths, result, self._holds, rows, N=count,
            NP=triton.next_power_of_2(count), num_warps=1,
        )  # fmt: skip


@triton.jit  # its compiler takes no types of Python
def _propose(rooms, row_lengths, drafted, proposes):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    room = tl.load(rooms + row) * tl.load(proposes)
    tl.store(drafted + row, tl.where(tl.load(row_lengths + row) > 0, room, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _accept(sampled, slots, row_lengths, drafted, lengths, result, holding, rows, N: tl.constexpr, NP: tl.constexpr):  # type: ignore[no-untyped-def]
    """As that of the engine, but for what holds: a program a row."""
    row = tl.program_id(0)
    index = tl.arange(0, NP)
    drawn = tl.load(sampled + row * N + index, mask=index < N, other=-1)
    tl.store(result + row * N + index, drawn, mask=index < N)
    length = tl.load(row_lengths + row)
    count = tl.load(drafted + row)
    holds = (index < count) & (tl.load(holding + length + index, mask=index < count, other=0) != 0)
    kept = tl.min(tl.where(holds, NP, index), 0)
    yielded = tl.where(length > 0, 1 + kept, 0)
    tl.store(result + rows * N + row, count)
    tl.store(result + rows * (N + 1) + row, yielded)
    tl.store(lengths + tl.load(slots + row), length + yielded)


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
    # Of several lengths: where all end at once, prompts share a step, until a draft that holds parts their requests.
    several = [
        msgspec.structs.replace(one, max_new_tokens=64 + 37 * number % 65)
        for number, one in enumerate(sampling(64, 96, temperature=1.0))
    ]
    return [
        Workload("JSON and tool calls", chats("json", "tool_call"), sampling(24, 64, **end), lookup, 1),
        Workload("copying", chats("copy"), sampling(24, 64, **end), lookup, 1),
        Workload("a story told again", again[:16], sampling(16, 96), lookup, 1),
        Workload("a new story, greedy", new[:16], sampling(16, 96), lookup, 1),
        Workload("a new story, t = 1", new[:16], sampling(16, 96, temperature=1.0), lookup, 1),
        Workload("8 new stories, t = 1", new, several, lookup, 8),
        Workload("16 new stories, t = 1", new, several, lookup, 16),
    ]


def forced_workloads(most: int, vocab: int, rows: Sequence[int], new_tokens: int) -> list[Workload]:
    rng = Random(1)
    made = []
    for count in rows:
        prompts = [[rng.randrange(vocab) for _ in range(128)] for _ in range(count)]
        for acceptance in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):

            def forced(outputs: list[list[int]], acceptance: float = acceptance) -> Drafter:
                return Forced(most, acceptance, outputs, vocab)

            drawn = sampling(count, new_tokens)
            made.append(Workload(f"{count} x {acceptance:.0%}", prompts, drawn, forced, count, acceptance))
        drawn = sampling(count, new_tokens, temperature=1.0)
        made.append(Workload(f"{count} x none", prompts, drawn, lambda _: NgramDrafter(most), count))
    return made


def identity_workloads(most: int, count: int) -> list[Workload]:
    """Eight at a time: the draw in one go, and all other ways to draw, so many prompts each."""
    prompts, kinds = make_prompts(count), [{}, *(kind for kind in KINDS if len(kind) > 1)]
    end: dict[str, Any] = {"end_token_ids": (2041,)}
    greedy = sampling(count, 48, **end)
    drawn = sampling(count, 48, temperature=0.8, **end)
    mixed = [
        msgspec.structs.replace(one, **kinds[number % len(kinds)], logprobs=number % 4 == 0, top_logprobs=2)
        for number, one in enumerate(sampling(count, 48, temperature=0.7, **end))
    ]
    return [
        Workload(name, prompts, params, lambda _: NgramDrafter(most), 8)
        for name, params in (("greedy", greedy), ("sampled", drawn), ("all ways", mixed))
    ]


def parts_of(workload: Workload) -> list[slice]:
    """What is served at a stretch: with few rows some requests, for pairs that lie close together."""
    size = workload.rows if workload.rows in (1, len(workload.prompts)) else 4 * workload.rows
    return [slice(first, first + size) for first in range(0, len(workload.prompts), size)]


def measure(
    engine: InProcess, workload: Workload, repeats: int, *, cpu_time: bool, forced: ForcedOnDevice | None, most: int,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """most: drafts of a row, where a GPU makes them. rounds: how often a life serves all prompts."""
    settings: dict[str, Any] = {"max_running_requests": workload.rows, "radix_cache": False}
    expected = engine.serve(workload.prompts, workload.sampling, **settings)
    whole = [prompt + one.tokens for prompt, one in zip(workload.prompts, expected, strict=True)]
    if forced is not None:
        forced.expect(workload.forced)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    counts, same, number = Counter[str](), 0, 0
    for _ in range(repeats):
        other = engine.begin(None if most else workload.drafter(whole), drafts=most, **settings)
        lives = {PLAIN: other.plain_sibling(), OTHER: other, AGAIN: other.plain_sibling()}
        for part in rounds * parts_of(workload):
            for name in turns(number):
                got = lives[name].serve(workload.prompts[part], workload.sampling[part])
                seconds[name].append(lives[name].cpu_seconds if cpu_time else lives[name].seconds)
                if name == OTHER:
                    same += sum(one.tokens == it.tokens for one, it in zip(expected[part], got, strict=True))
            number += 1
        for name, life in lives.items():
            counts += Counter({key + " " + name: int(life.core.stats()[key]) for key in COUNTED})
    tokens = rounds * repeats * sum(len(one.tokens) for one in expected)
    return {
        "workload": workload.name,
        **ratios(seconds),
        "ms_a_token": round(1000 * sum(seconds[PLAIN]) / tokens, 3),
        "tokens": tokens,
        "same": f"{same}/{rounds * repeats * len(expected)}",
        "steps": counts["steps_total " + PLAIN],
        "steps_with": counts["steps_total " + OTHER],
        "drafted": counts["draft_tokens_total " + OTHER],
        "accepted": counts["accepted_tokens_total " + OTHER],
        "slower": other.core.speculation.multiples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=EMBEDDED)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--most", type=int, default=12, help="drafts of a row (12)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[1], help="of the dummy model (1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each row of the dummy model (64)")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a busy machine; with one thread")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--identity", type=int, help="only compare tokens, of so many prompts a way to draw")
    parser.add_argument("--draft-model-path", type=Path, help="on a GPU: what makes drafts, instead of looking them up")
    parser.add_argument("--warm-up", action="store_true", help="only compile what there is to compile")
    parser.add_argument("--only", nargs="*", default=[""], help="workloads with one of these in their name")
    options = parser.parse_args()
    torch.manual_seed(0)
    dummy = options.load_format == "dummy"
    on_gpu = options.device == "cuda"
    most_rows = max(options.rows) if dummy else 8 if options.identity else 16
    gpu: dict[str, Any] = {"device": torch.device("cuda", 0), "drafts": options.most, "rows": most_rows}
    gpu["draft"] = options.draft_model_path
    if dummy:
        gpu["graph_rows"] = options.rows
    engine = InProcess(
        options.model_path, getattr(torch, options.dtype), dummy=dummy, pages=max(600, 32 * most_rows), context=512,
        **gpu if on_gpu else {},
    )  # fmt: skip
    forced = None
    if on_gpu and dummy:
        forced = ForcedOnDevice(600, engine.model.device)
        engine.replace_drafts(accept=forced.accept)
        if options.draft_model_path is None:
            engine.replace_drafts(propose=forced.propose)
    if options.warm_up:
        engine.serve([[1, 2, 3]], sampling(1, 4), max_running_requests=1)
        return
    workloads = (
        forced_workloads(options.most, engine.model.config.vocab_size, options.rows, options.new_tokens)
        if dummy
        else identity_workloads(options.most, options.identity)
        if options.identity
        else embedded_workloads(options.most)
    )
    results = []
    for workload in workloads:
        if any(part in workload.name for part in options.only):
            one = measure(
                engine, workload, options.repeats, cpu_time=options.cpu_time, forced=forced,
                most=options.most if on_gpu else 0, rounds=options.rounds,
            )  # fmt: skip
            results.append(one)
            print(results[-1], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
