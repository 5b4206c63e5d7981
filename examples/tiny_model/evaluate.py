"""Held-out accuracy of a tiny model, task by task, without and with thinking: a table, and last one JSON line.

    python -m examples.tiny_model.evaluate --model FOLDER --backend transformers
    python -m examples.tiny_model.evaluate --model FOLDER --backend engine --engine max_running_requests=1

To compare two ways of running the same model, write the answers of one with --save-answers FILE, and give the same
file to the other as --compare-answers FILE: the share of identical texts is reported, and so are the texts that differ.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from examples.tiny_model.prompts import (
    CLOSED_TASKS,
    HARD_TASKS,
    ClosedPrompt,
    answer_of,
    closed_answer_prompts,
    with_shared_prefix,
)
from examples.tiny_model.template import Message

MAX_NEW_TOKENS = 192


class Backend(Protocol):
    """Anything that answers conversations greedily."""

    def answers(self, conversations: Sequence[list[Message]], *, thinking: bool) -> list[str]:
        """The assistant's next turn of each conversation as text, thinking block included."""
        ...

    def close(self) -> None:
        """Gives back what the backend holds."""
        ...


class TransformersBackend:
    """transformers' own `generate`, in batches of conversations of similar length, padded on the left."""

    def __init__(self, model: Path, dtype: str, device: str | None, batch_size: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        torch.nn.Module.to(self._model, place).train(False)
        self._batch_size = batch_size

    def answers(self, conversations: Sequence[list[Message]], *, thinking: bool) -> list[str]:
        prompts = [
            str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
                )
            )
            for messages in conversations
        ]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for index, text in zip(chosen, self.complete([prompts[index] for index in chosen]), strict=True):
                texts[index] = text
        return texts

    def complete(self, prompts: list[str]) -> list[str]:
        """What follows each raw text, greedily, up to an end token or `MAX_NEW_TOKENS`; all in one batch."""
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(self._model.device)
        with self._torch.inference_mode():
            outputs = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
            )
        generated = outputs[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self._tokenizer.batch_decode(generated, skip_special_tokens=True)
        return texts

    def close(self) -> None:
        del self._model


class EngineBackend:
    """vibe-sgl-lite's own pipeline; `options` are keyword arguments of `LLM`."""

    def __init__(self, model: Path, dtype: str, options: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        from vibe_sgl_lite import LLM, SamplingParams

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0)
        self._llm = LLM(model_path=str(model), dtype=dtype, **options)

    def answers(self, conversations: Sequence[list[Message]], *, thinking: bool) -> list[str]:
        outputs = self._llm.chat(list(conversations), self._params, enable_thinking=thinking)
        return [self._whole_text(output.text, output.token_ids) for output in outputs]

    def _whole_text(self, text: str, token_ids: Sequence[int]) -> str:
        """The whole turn from its token ids: the engine may leave thinking and tool calls out of `text`.

        Where the engine's own text has another answer than its tokens, that text is returned, so that it shows.
        """
        whole: str = self._tokenizer.decode(list(token_ids))
        spoken = [answer_of(turn).split("<tool_call>")[0].strip("\n") for turn in (whole, text)]
        return whole if spoken[0] == spoken[1] else text

    def close(self) -> None:
        self._llm.close()


def accuracies(prompts: Sequence[ClosedPrompt], texts: Sequence[str]) -> dict[str, float]:
    """Share of exactly right answers, 0 to 1, of each task."""
    right: dict[str, list[bool]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        right.setdefault(prompt.task, []).append(answer_of(text) == prompt.expected)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


def wrong(prompts: Sequence[ClosedPrompt], texts: Sequence[str], limit: int) -> Iterator[str]:
    """Up to `limit` wrong answers a task, each on one line."""
    shown: dict[str, int] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        if answer_of(text) != prompt.expected and shown.setdefault(prompt.task, 0) < limit:
            shown[prompt.task] += 1
            question = prompt.messages[-1]["content"]
            yield f"{prompt.task}: {question[-120:]!r} -> {text[-200:]!r}, expected {prompt.expected!r}"


def print_table(direct: dict[str, float], thinking: dict[str, float], a_task: int) -> None:
    """The accuracies as a Markdown table."""
    print(f"| task ({a_task} held-out prompts each) | without thinking | with thinking |\n|---|---|---|")
    for task in direct:
        print(f"| {task} | {100 * direct[task]:.1f} % | {100 * thinking[task]:.1f} % |")


def agreement(name: str, texts: list[str], saved: list[str]) -> float:
    """Share of identical texts; the differing ones go to stderr."""
    same = [one == other for one, other in zip(texts, saved, strict=True)]
    for one, other, equal in zip(texts, saved, same, strict=True):
        if not equal:
            print(f"{name}: {one!r} was {other!r}", file=sys.stderr)
    return sum(same) / len(same)


def evaluate(arguments: argparse.Namespace, backend: Backend) -> dict[str, Any]:
    """Runs everything and prints the table; returns what the JSON line says."""
    tasks = CLOSED_TASKS if arguments.closed_only else CLOSED_TASKS + HARD_TASKS
    prompts = closed_answer_prompts(arguments.per_task * len(tasks), arguments.seed, tasks)
    if arguments.prefix_stories:
        prompts = with_shared_prefix(prompts, arguments.prefix_stories, arguments.seed)
    report: dict[str, Any] = {"model": str(arguments.model), "backend": arguments.backend, "dtype": arguments.dtype}
    texts, scores = {}, {}
    for name, thinking in (("direct", False), ("thinking", True)):
        started = time.monotonic()
        texts[name] = backend.answers([prompt.messages for prompt in prompts], thinking=thinking)
        scores[name] = accuracies(prompts, texts[name])
        print(f"{name}: {len(prompts)} prompts in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        for line in wrong(prompts, texts[name], arguments.show_wrong):
            print(f"{name} {line}", file=sys.stderr)
    print_table(scores["direct"], scores["thinking"], arguments.per_task)
    report |= {"per_task": arguments.per_task, "accuracy": scores}
    if arguments.save_answers:
        arguments.save_answers.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    if arguments.compare_answers:
        saved = json.loads(arguments.compare_answers.read_text(encoding="utf-8"))
        report["identical"] = {name: agreement(name, texts[name], saved[name]) for name in texts}
    return report


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"--engine takes NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--backend", choices=["transformers", "engine"], default="transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--per-task", type=int, default=100, help="prompts a task (default 100)")
    parser.add_argument("--closed-only", action="store_true", help="leave out the tasks that are not promised")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default 0)")
    parser.add_argument(
        "--prefix-stories",
        type=int,
        default=0,
        help="put all prompts after this many stories (110 tokens each; default 0)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="transformers only (default 64)")
    parser.add_argument("--device", help="transformers only: cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--engine", type=_option, action="append", default=[], metavar="NAME=VALUE", help="LLM option")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong answers to show a task (default 0)")
    parser.add_argument("--save-answers", type=Path, metavar="FILE", help="write all texts as JSON")
    parser.add_argument("--compare-answers", type=Path, metavar="FILE", help="compare all texts with saved ones")
    arguments = parser.parse_args()
    backend: Backend
    if arguments.backend == "engine":
        backend = EngineBackend(arguments.model, arguments.dtype, dict(arguments.engine))
    else:
        backend = TransformersBackend(arguments.model, arguments.dtype, arguments.device, arguments.batch_size)
    try:
        report = evaluate(arguments, backend)
    finally:
        backend.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
