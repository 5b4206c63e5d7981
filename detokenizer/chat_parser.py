"""Takes the thinking block and the tool calls out of a chat's text, as it comes in pieces.

The result does not depend on how the text was cut. Text that may still become a tag is held back, and so are line
breaks, which belong to a tag if one follows: templates put them around thinking blocks and calls, and they are no part
of what is said. A block that never closes, or holds no call, stays in the text as it is.

Knows nothing of tokens and stop strings.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import msgspec

from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.text.chat_format import (
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CLOSE,
    TOOL_OPEN,
    find_call_end,
    parse_tool_call,
)


class Parsed(msgspec.Struct, gc=False):
    """What is new. tool_calls: raw JSON texts, each of which `parse_tool_call` takes."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[str, ...] = ()


class _State(Enum):
    START = auto()  # a thinking block may begin here, and nowhere else
    REASONING = auto()
    TEXT = auto()
    CALL = auto()  # `_held` begins with line breaks and an open tag


class ChatParser:
    """Parses one sample; not to be used after `end`."""

    def __init__(self, text_format: TextFormat) -> None:
        self._tools = text_format.tools
        if not text_format.think:
            self._state = _State.TEXT
        elif text_format.inside:
            self._state = _State.REASONING
        else:
            self._state = _State.START
        self._held = ""
        self._skip_breaks = text_format.think and text_format.inside  # line breaks that come next are dropped
        self._after_call = False  # nothing but line breaks has come since a call
        self._new = Parsed()

    def add(self, piece: str) -> Parsed:
        """What `piece` settles."""
        self._held += piece
        return self._advance(final=False)

    def end(self) -> Parsed:
        """The rest: nothing more comes."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> Parsed:
        steps: dict[_State, Callable[[bool], bool]] = {
            _State.START: self._start,
            _State.REASONING: self._reason,
            _State.TEXT: self._text,
            _State.CALL: self._call,
        }
        while self._held and steps[self._state](final):
            pass
        new, self._new = self._new, Parsed()
        return new

    # Each step takes what it can off `_held` and returns whether there may be more to take.

    def _start(self, final: bool) -> bool:
        if self._held.startswith(THINK_OPEN):
            self._held = self._held[len(THINK_OPEN) :]
            self._state, self._skip_breaks = _State.REASONING, True
        elif not final and THINK_OPEN.startswith(self._held):
            return False
        else:
            self._state = _State.TEXT
        return True

    def _reason(self, final: bool) -> bool:
        if not self._begin():
            return False
        before, tag, rest = self._held.partition(THINK_CLOSE)
        if tag:
            self._new.reasoning += before.rstrip("\n")
            self._held = rest
            self._state, self._skip_breaks = _State.TEXT, True
            return True
        border = len(self._held.rstrip("\n")) if final else _border(self._held, THINK_CLOSE)
        self._new.reasoning += self._held[:border]
        self._held = self._held[border:]
        return False

    def _text(self, final: bool) -> bool:
        if not self._begin():
            return False
        if not self._tools:
            self._show(len(self._held))
            return False
        at = self._held.find(TOOL_OPEN)
        if at >= 0:
            self._show(len(self._held[:at].rstrip("\n")))
            self._state = _State.CALL
            return True
        if final and self._after_call and not self._held.strip("\n"):
            self._held = ""
        self._show(len(self._held) if final else _border(self._held, TOOL_OPEN))
        return False

    def _call(self, final: bool) -> bool:
        begin = self._held.index(TOOL_OPEN) + len(TOOL_OPEN)
        first = self._held.find(TOOL_CLOSE, begin)
        if first < 0:
            if final:
                self._show(len(self._held))
            return False
        length = find_call_end(self._held[begin:])
        if length is None and not final:
            return False
        raw = self._held[begin : begin + (length or 0)].strip()
        if parse_tool_call(raw) is not None:
            self._new.tool_calls += (raw,)
            self._held = self._held[begin + (length or 0) + len(TOOL_CLOSE) :]
            self._after_call = True
        else:
            self._show(first + len(TOOL_CLOSE))
        self._state = _State.TEXT
        return True

    def _begin(self) -> bool:
        """Drop the line breaks right after a tag; whether anything else has come."""
        if self._skip_breaks:
            self._held = self._held.lstrip("\n")
            self._skip_breaks = not self._held
        return bool(self._held)

    def _show(self, count: int) -> None:
        """Move `count` characters to the text."""
        if count:
            self._new.text += self._held[:count]
            self._held = self._held[count:]
            self._after_call = False


def _border(text: str, tag: str) -> int:
    """Where the tail of `text` begins that may belong to a `tag` to come: line breaks, then a beginning of the tag."""
    border = len(text)
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            border -= length
            break
    return len(text[:border].rstrip("\n"))
