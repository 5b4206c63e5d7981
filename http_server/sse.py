"""Server-sent events: bytes of one event, and text deltas from a template made once."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HOLE = "\0text\0"
_encoder = msgspec.json.Encoder()


def event(value: object, name: str | None = None) -> bytes:
    """`data:` alone, or with an `event:` line."""
    data = _encoder.encode(value)
    return b"data: %b\n\n" % data if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class TextTemplate:
    """An event in which only texts change: all else is encoded once.

    value: the event, with HOLE wherever the text stands, and NUMBER where a number does that may change too.
    """

    HOLE = _HOLE
    NUMBER = 987_654_321_987_654_321

    def __init__(self, value: Mapping[str, object], name: str | None = None) -> None:
        self._parts = event(value, name).split(_encoder.encode(_HOLE))

    def fill(self, text: str) -> bytes:
        return _encoder.encode(text).join(self._parts)

    def numbered(self, number: int) -> TextTemplate:
        """The same with NUMBER filled in."""
        filled = TextTemplate.__new__(TextTemplate)
        digits = b"%d" % number
        filled._parts = [part.replace(b"%d" % self.NUMBER, digits) for part in self._parts]
        return filled
