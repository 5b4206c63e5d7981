"""Requests of every kind that keeps state from token to token, and what came of them.

In float32 a token is a function of prompt, parameters and the tokens before it: an answer is known once it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vibe_sgl_lite import Client, OutputChunk, SamplingParams

SHARED = "One day a girl and her dog went to the river. " * 6  # a prefix that the radix cache shares
LIST = '{"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 3}}}'
KINDS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.1, "seed": 11, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "presence_penalty": 0.4},
    {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.5, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.9, "seed": 5, "n": 2},
    {"temperature": 0.9, "seed": 9, "stop": [" and then she was", "\n\n\n", "e"], "ignore_eos": False},
    {"temperature": 0, "stop": [" zzz", "the dog and", "girl"], "min_new_tokens": 40},
    {"temperature": 0.7, "seed": 13, "ignore_eos": False, "json_schema": LIST},
    {"temperature": 1.0, "seed": 17, "chat": True},
    {"temperature": 0.9, "seed": 19, "n": 3, "logprobs": True, "prompt_logprobs": True},
    {"temperature": 0.9},
)


@dataclass(frozen=True)
class Ask:
    """One request. options: what `Client.stream` takes beside the sampling parameters."""

    prompt: str
    params: SamplingParams
    options: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False

    @property
    def has_seed(self) -> bool:
        """Else the engine draws one, and tells; the answer is known only from asking again, with that seed."""
        return self.params.temperature == 0 or "seed" in self.params.to_dict()

    def with_seed(self, seed: int) -> Ask:
        return replace(self, params=SamplingParams(**{**self.params.to_dict(), "seed": seed}))

    def stream(self, client: Client) -> Any:
        if self.chat:
            return client.stream_chat([{"role": "user", "content": self.prompt}], self.params, **self.options)
        return client.stream(self.prompt, self.params, **self.options)


def make_asks(count: int, tokens: int) -> list[Ask]:
    """`count` requests, the kinds one after the other, of `tokens` tokens unless something ends them before."""
    asks = []
    for number in range(count):
        kind = {"ignore_eos": True, "max_new_tokens": tokens, **KINDS[number % len(KINDS)]}
        chat = bool(kind.pop("chat", False))
        options = {name: kind.pop(name) for name in ("json_schema",) if name in kind}
        prompt = (SHARED if number % 2 else "") + f"Story number {number}:"
        asks.append(Ask(prompt, SamplingParams(**kind), options, chat))
    return asks


@dataclass
class Sample:
    """What came of one sample, joined. ends: its terminal events, of which there must be one. logprobs: (token id,
    text, offset) of each, without the value, which may differ in its last digits with the batch."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, str, int | None]] = field(default_factory=list)
    prompt_logprobs: int = 0
    ends: list[str] = field(default_factory=list)
    matched: int | str | None = None
    completion_tokens: int = 0


class Answer(dict[int, Sample]):
    """By the sample's index."""

    def add(self, chunk: OutputChunk) -> None:
        sample = self.setdefault(chunk.index, Sample())
        sample.text += chunk.text
        sample.reasoning += chunk.reasoning
        sample.token_ids += chunk.token_ids
        sample.logprobs += [(entry.token_id, entry.text, entry.text_offset) for entry in chunk.logprobs or ()]
        sample.prompt_logprobs += len(chunk.prompt_logprobs or ())
        if chunk.finish_reason is not None:
            sample.ends.append(chunk.finish_reason if chunk.error is None else str(chunk.error))
            sample.matched = chunk.matched
            sample.completion_tokens = 0 if chunk.usage is None else chunk.usage.completion_tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.values())


def difference(got: Answer, wanted: Answer, *, whole: bool = True) -> str | None:
    """None if they are the same, else where they differ. whole: else `got` may end early, without a terminal event."""
    for index in sorted({*got, *wanted} if whole else got):
        mine, theirs = got.get(index, Sample()), wanted.get(index, Sample())
        if whole and mine != theirs:
            return f"sample {index}: {_first(vars(mine), vars(theirs))}"
        if not whole and len(mine.ends) > 1:
            return f"sample {index}: {len(mine.ends)} terminal events: {mine.ends}"
        if not whole and theirs.token_ids[: len(mine.token_ids)] != mine.token_ids:
            return f"sample {index}: {mine.token_ids} is no beginning of {theirs.token_ids}"
        if not whole and not theirs.text.startswith(mine.text):
            return f"sample {index}: {mine.text!r} is no beginning of {theirs.text!r}"
    return None


def _first(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return next(f"{name} is {mine[name]!r}, not {theirs[name]!r}" for name in mine if mine[name] != theirs[name])


def undisturbed(client: Client, asks: Iterable[Ask]) -> list[Answer]:
    """All of them, together."""
    answers = []
    for stream in [ask.stream(client) for ask in asks]:
        answer = Answer()
        for chunk in stream:
            answer.add(chunk)
        answers.append(answer)
    return answers
