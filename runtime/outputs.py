"""What callers get: whole outputs, and the chunks of a stream. Built here from the engine's messages.

Knows nothing of sockets and threads.
"""

from __future__ import annotations

import msgspec

from runtime.errors import UserError, VibeError, error_from_code
from runtime.messages import Accepted, Chunk, LogprobEntry, Usage, unpack_ids
from runtime.sampling_params import ResolvedSampling


class OutputChunk(msgspec.Struct, frozen=True, kw_only=True):
    """What is new since the chunk before. The last one carries `finish_reason`, `matched` and `usage`.

    token_ids: new tokens; text: new text, which may lag behind the tokens (characters that are not complete yet, text
    that may become a stop string). index: the sample.
    """

    rid: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    matched: int | str | None = None
    usage: Usage | None = None
    logprobs: list[LogprobEntry] | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """All that was generated for one prompt.

    token_ids: every generated token, the one that ended it included. finish_reason: "stop" (`matched` says which token
    id or string), "length", "abort", or "error" (`error` says why; what was generated before is kept).
    usage: None when the engine died before it could say. sampling: what the request ran with, its seed included; None
    when it was never accepted.
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
    )


class Collector:
    """Joins one request's events. `done` after the terminal one; `error` is set when that was a failure."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.done = False
        self.error: VibeError | None = None
        self.sampling: ResolvedSampling | None = None
        self._texts: list[str] = []
        self._ids = bytearray()
        self._logprobs: list[LogprobEntry] | None = None
        self._prompt_logprobs: list[LogprobEntry | None] | None = None
        self._reason = "error"
        self._matched: int | str | None = None
        self._usage: Usage | None = None

    def add(self, event: Accepted | Chunk | VibeError) -> None:
        """Must not be called again once `done`."""
        match event:
            case Accepted():
                self.sampling = event.sampling
            case Chunk():
                self._add_chunk(event)
            case _:
                self.error = event
                self.done = True

    def _add_chunk(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self._ids += chunk.token_ids
        if chunk.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs.extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = list(chunk.prompt_logprobs)
        if chunk.finish is not None:
            self._reason = chunk.finish.reason
            self._matched = chunk.finish.matched
            self._usage = chunk.usage
            if chunk.finish.error is not None:
                info = chunk.finish.error
                self.error = error_from_code(info.code, info.message, info.field)
            self.done = True

    def output(self) -> Output:
        """Everything that came; call it once `done`."""
        return Output(
            rid=self.rid,
            text="".join(self._texts),
            token_ids=unpack_ids(bytes(self._ids)),
            finish_reason=self._reason,
            matched=self._matched,
            usage=self._usage,
            sampling=self.sampling,
            error=self.error,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )

    def failure(self) -> VibeError:
        """The error to raise; an engine's error carries what was generated before it as `output`."""
        assert self.error is not None
        if not isinstance(self.error, UserError):
            self.error.output = self.output()
        return self.error
