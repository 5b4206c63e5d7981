"""What callers get: whole outputs, and the chunks of a stream. Built here from the engine's messages.

Knows nothing of sockets and threads.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from vibe_sgl_lite.runtime.errors import UserError, VibeError, error_from_code
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, Finish, LogprobEntry, Usage, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.runtime.text.chat_format import ToolCall, parse_tool_call

# Where other engines have what is here, vLLM's `out.outputs[0].text` among them.
_MEANT = {"outputs": "text", "choices": "text", "generated_text": "text", "output_ids": "token_ids"}
_MEANT |= {"reasoning_content": "reasoning", "content": "text"}


class _Plain(msgspec.Struct, frozen=True):
    """What can be written down."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            ours = _MEANT.get(name)
            told = f"; there is .{ours}" if ours in self.__struct_fields__ else ""
            raise AttributeError(f"{type(self).__name__} has no {name}{told}", name=name, obj=self)

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists, texts and numbers alone; an error is its code, message and field."""
        return {name: _plain(getattr(self, name)) for name in self.__struct_fields__}

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


class WeightSpan(_Plain, frozen=True):
    """Tokens `start` up to `end` (not included) of a sample were made by the weights of this version."""

    version: str
    start: int
    end: int


class OutputChunk(_Plain, frozen=True, kw_only=True):
    """What is new of sample `index` since its chunk before. Its last one has `finish_reason`, `matched` and `usage`.

    token_ids: new tokens; text: new text, which may lag behind the tokens (characters that are not complete yet, text
    that may become a stop string or a tag). reasoning, tool_calls: of chats, as in `Output`; a call comes when it is
    complete. prompt_logprobs: in the first chunk. error: why this sample of several ended with "error".
    weight_versions: in the first chunk, and where the model's weights have changed: (index of the first token that they
    made, their version).
    """

    rid: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    matched: int | str | None = None
    usage: Usage | None = None
    logprobs: list[LogprobEntry] | None = None
    prompt_logprobs: list[LogprobEntry | None] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    error: VibeError | None = None
    weight_versions: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        """What it brings; `to_dict` has all of it."""
        calls = [(call.name, call.arguments) for call in self.tool_calls]
        values: dict[str, object] = {
            "index": self.index or None,
            "text": self.text,
            "reasoning": self.reasoning or None,
        }
        values |= {"tool_calls": calls or None, "finish_reason": self.finish_reason, "matched": self.matched}
        values |= {"error": self.error, "tokens": len(self.token_ids)}
        shown = {name: value for name, value in values.items() if value is not None}
        return f"OutputChunk({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class Output(_Plain, frozen=True, kw_only=True):
    """All that was generated for one prompt; with n > 1, by sample `index`.

    text: of a chat, without the thinking block and the tool calls. reasoning: what the thinking block holds, "" without
    one. tool_calls: each with name, arguments and the raw JSON text; only chats with `tools` have them, and what cannot
    be read as a call stays in the text.
    token_ids: every generated token, the one that ended it included. finish_reason: "stop" (`matched` says which token
    id or string), "length", "abort", or "error" (`error` says why; what was generated before is kept).
    usage: None when the engine died before it could say. sampling: what the sample ran with, its own seed included;
    None when the request was never accepted.
    logprobs: one entry a token (token_id, logprob, text, top), if asked for. prompt_logprobs: one a prompt token, the
    first of which is None.
    weight_versions: which version of the weights made which tokens; several where they changed under way.
    weight_version: the last of them; None when nothing has come.
    """

    rid: str
    text: str
    token_ids: list[int]
    finish_reason: str
    matched: int | str | None = None
    usage: Usage | None = None
    sampling: ResolvedSampling | None = None
    error: VibeError | None = None
    logprobs: list[LogprobEntry] | None = None
    prompt_logprobs: list[LogprobEntry | None] | None = None
    index: int = 0
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    weight_versions: list[WeightSpan] = []
    weight_version: str | None = None

    @property
    def hint(self) -> str | None:
        """What to do about an output that is surely not what was wanted; None for any other."""
        if self.finish_reason == "length" and self.reasoning and not (self.text or self.tool_calls):
            return "only the thinking block came: raise max_new_tokens, bound max_thinking_tokens, or turn thinking off"
        return None

    def __repr__(self) -> str:
        """What one looks for first; `to_dict` has all of it."""
        shown: dict[str, object] = {"text": self.text}
        if self.index:
            shown["index"] = self.index
        if self.reasoning:
            shown["reasoning"] = self.reasoning
        if self.tool_calls:
            shown["tool_calls"] = [(call.name, call.arguments) for call in self.tool_calls]
        shown["finish_reason"] = self.finish_reason
        if self.matched is not None:
            shown["matched"] = self.matched
        if self.error is not None:
            shown["error"] = self.error
        shown["tokens"] = len(self.token_ids)
        if self.hint is not None:
            shown["hint"] = self.hint
        return f"Output({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class Embedding(_Plain, frozen=True, kw_only=True):
    """What one text or prompt was embedded as.

    vector: float32, of length 1; numpy and torch read it without a copy (`numpy.asarray`, `torch.frombuffer`). Empty
    unless finish_reason is "stop": "abort", or "error" (`error` says why). usage: its prompt's tokens. weight_version:
    as in `Output`.
    """

    rid: str
    vector: array[float]
    finish_reason: str
    usage: Usage | None = None
    error: VibeError | None = None
    weight_version: str | None = None

    def __repr__(self) -> str:
        """What it is; `to_dict` has all of it."""
        failed = "" if self.error is None else f", error={self.error!r}"
        return f"Embedding(dimensions={len(self.vector)}, finish_reason={self.finish_reason!r}{failed})"


def chunk_from_message(chunk: Chunk) -> OutputChunk:
    finish = chunk.finish
    return OutputChunk(
        rid=chunk.rid,
        index=chunk.index,
        text=chunk.text,
        token_ids=unpack_ids(chunk.token_ids),
        finish_reason=None if finish is None else finish.reason,
        matched=None if finish is None else finish.matched,
        usage=chunk.usage,
        logprobs=None if chunk.logprobs is None else list(chunk.logprobs),
        prompt_logprobs=None if chunk.prompt_logprobs is None else list(chunk.prompt_logprobs),
        reasoning=chunk.reasoning,
        tool_calls=_tool_calls(chunk),
        error=_error(finish),
        weight_versions=list(chunk.weight_versions),
    )


class Collector:
    """Joins one request's events. `done` after the last sample's end; `error` is set when all of it failed."""

    def __init__(self, rid: str, n: int = 1) -> None:
        self.rid = rid
        self.done = False
        self.error: VibeError | None = None
        self.sampling: ResolvedSampling | None = None
        self._samples = [_Sample() for _ in range(n)]
        self._running = n

    def add(self, event: Accepted | Chunk | VibeError) -> None:
        """Must not be called again once `done`."""
        match event:
            case Accepted():
                self.sampling = event.sampling
            case Chunk():
                self._samples[event.index].add(event)
                if event.finish is not None:
                    self._running -= 1
                    self.done = self._running == 0
                if self.done and all(sample.error is not None for sample in self._samples):
                    self.error = self._samples[0].error
            case _:
                self.error = event
                self.done = True

    def result(self) -> Output | list[Output]:
        """Everything that came, a list when n > 1; call it once `done`."""
        outputs = [sample.output(index, self) for index, sample in enumerate(self._samples)]
        return outputs if len(outputs) > 1 else outputs[0]

    def pooled(self) -> Embedding:
        """The same of a request for what a prompt gives without new tokens; an embedding, or probabilities."""
        out = self._samples[0].output(0, self)
        vector = array("f", self._samples[0].pooled)
        return Embedding(
            rid=out.rid, vector=vector, finish_reason=out.finish_reason, usage=out.usage, error=out.error,
            weight_version=out.weight_version,
        )  # fmt: skip

    def failure(self) -> VibeError:
        """The error to raise; an engine's error carries what was generated before it as `output`."""
        assert self.error is not None
        if not isinstance(self.error, UserError):
            self.error.output = self.result()
        return self.error


class _Sample:
    """What came of one sample."""

    def __init__(self) -> None:
        self.error: VibeError | None = None
        self.pooled = b""
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[ToolCall] = []
        self._ids = bytearray()
        self._logprobs: list[LogprobEntry] | None = None
        self._prompt_logprobs: list[LogprobEntry | None] | None = None
        self._finish: Finish | None = None
        self._usage: Usage | None = None
        self._versions: list[tuple[int, str]] = []

    def add(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self._reasoning.append(chunk.reasoning)
        self._tool_calls += _tool_calls(chunk)
        self._ids += chunk.token_ids
        self._versions += chunk.weight_versions
        if chunk.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs.extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = list(chunk.prompt_logprobs)
        if chunk.finish is not None:
            self._finish, self._usage = chunk.finish, chunk.usage
            self.pooled = chunk.pooled or b""
            self.error = _error(chunk.finish)

    def output(self, index: int, request: Collector) -> Output:
        finish = self._finish or Finish("error")  # without one, the request as a whole has failed
        sampling = request.sampling
        if index and sampling is not None:
            sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + index) % 2**64)
        token_ids = unpack_ids(bytes(self._ids))
        return Output(
            rid=request.rid,
            text="".join(self._texts),
            token_ids=token_ids,
            finish_reason=finish.reason,
            matched=finish.matched,
            usage=self._usage,
            sampling=sampling,
            error=self.error if self._finish is not None else request.error,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            index=index,
            reasoning="".join(self._reasoning),
            tool_calls=self._tool_calls,
            weight_versions=weight_spans(self._versions, len(token_ids)),
            weight_version=self._versions[-1][1] if self._versions else None,
        )


def weight_spans(changes: Iterable[tuple[int, str]], count: int) -> list[WeightSpan]:
    """Of `count` tokens, from what a sample's chunks say, in order."""
    spans: list[WeightSpan] = []
    for first, version in changes:
        if spans:
            last = spans.pop()
            if last.version == version:
                first = last.start
            elif last.start < first:
                spans.append(WeightSpan(last.version, last.start, first))
        spans.append(WeightSpan(version, first, count))
    return [span for span in spans if span.start < span.end]


def _tool_calls(chunk: Chunk) -> list[ToolCall]:
    calls = [parse_tool_call(raw) for raw in chunk.tool_calls]
    return [call for call in calls if call is not None]


def _error(finish: Finish | None) -> VibeError | None:
    if finish is None or finish.error is None:
        return None
    return error_from_code(finish.error.code, finish.error.message, finish.error.field)


def _plain(value: Any) -> Any:
    if isinstance(value, VibeError):
        return {"code": value.code, "message": str(value), "field": getattr(value, "field", None)}
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple | array) else value
