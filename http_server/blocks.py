"""A sample's output as blocks that follow each other: thinking, text, tool calls. Anthropic's API and OpenAI's
responses tell their streams so."""

from __future__ import annotations

from typing import Literal

import msgspec

from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.sse import TextTemplate
from vibe_sgl_lite.http_server.streaming import ID_BYTES, Collected, UsageCounter
from vibe_sgl_lite.http_server.tools import CallText, read_calls
from vibe_sgl_lite.runtime.messages import Chunk, Finish

Kind = Literal["thinking", "text", "call"]


class Block(msgspec.Struct):
    """text: of thinking and text so far, of a call its arguments. call: of a call."""

    index: int
    kind: Kind
    text: str = ""
    call: CallText | None = None


class Opened(msgspec.Struct, frozen=True):
    block: Block


class Added(msgspec.Struct, frozen=True):
    block: Block
    text: str


class Closed(msgspec.Struct, frozen=True):
    block: Block


BlockEvent = Opened | Added | Closed


class Blocks:
    """thinking_tokens: those that came up to the last text of the thinking block."""

    def __init__(self, *, one_call: bool = False, with_thinking: bool = True) -> None:
        self.done: list[Block] = []
        self.thinking_tokens = 0
        self._open: Block | None = None
        self._one_call = one_call
        self._with_thinking = with_thinking
        self._tokens = 0

    @property
    def calls(self) -> int:
        return sum(block.kind == "call" for block in self.done)

    def add(self, chunk: Chunk) -> list[BlockEvent]:
        self._tokens += len(chunk.token_ids) // ID_BYTES
        events: list[BlockEvent] = []
        if chunk.reasoning and self._with_thinking:
            self.thinking_tokens = self._tokens
            self._put("thinking", chunk.reasoning, events)
        if chunk.text and (self._open is not None or chunk.text.strip("\n")):
            self._put("text", chunk.text, events)
        for call in read_calls(chunk.tool_calls):
            if self._one_call and self.calls:
                break
            self._close(events)
            block = Block(len(self.done), "call", call.arguments, call)
            self.done.append(block)
            events += [Opened(block), Added(block, call.arguments), Closed(block)]
        if chunk.finish is not None:
            self._close(events)
        return events

    def _put(self, kind: Kind, text: str, events: list[BlockEvent]) -> None:
        if self._open is None or self._open.kind != kind:
            self._close(events)
            self._open = Block(len(self.done), kind)
            self.done.append(self._open)
            events.append(Opened(self._open))
        self._open.text += text
        events.append(Added(self._open, text))

    def _close(self, events: list[BlockEvent]) -> None:
        if self._open is not None:
            events.append(Closed(self._open))
            self._open = None


class BlockAnswer:
    """To one request of one sample, as far as it is the same for every API that tells blocks. count: of its usage."""

    def __init__(self, call: Call, *, one_call: bool, with_thinking: bool = True) -> None:
        self._call = call
        self._blocks = Blocks(one_call=one_call, with_thinking=with_thinking)
        self._count = UsageCounter(0)
        self._finish = Finish("error")
        self._delta: TextTemplate | None = None  # of the open block

    def events(self, index: int, chunk: Chunk) -> bytes:
        self._count.add(chunk)
        self._finish = chunk.finish or self._finish
        return b"".join([self._event(event) for event in self._blocks.add(chunk)])

    def _event(self, event: BlockEvent) -> bytes:
        raise NotImplementedError

    def _add_all(self, sample: Collected) -> None:
        """A whole sample."""
        usage = sample.usage
        self._finish = sample.finish
        self._count = UsageCounter(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        for chunk in sample.chunks:
            self._blocks.add(chunk)
