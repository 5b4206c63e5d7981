"""Stop strings over text that comes in pieces. Knows nothing of tokens.

The match is the stop string that is complete first, in characters; of several that are complete with the same
character, the longest. So the result does not depend on how the text was cut into pieces. Text that may still turn out
to be the beginning of a stop string is held back: max(len(stop)) - 1 characters at most, and only as many as match.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Not to be used after a match. `include_stop`: the matched string stays in the text."""

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        assert stops
        assert all(stops)
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """(text that can be shown now, the stop string that was completed or None)."""
        if not piece:
            return "", None
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self._include_stop else start], stop
        border = self._first_open(text)
        self._held = text[border:]
        return text[:border], None

    def flush(self) -> str:
        """What was held back: the text ends here, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, text: str) -> int:
        """Where the longest tail of `text` starts that is the beginning of a stop string; len(text) if none is."""
        border = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), border)
            while start >= 0:
                if stop.startswith(text[start:]):
                    border = start
                    break
                start = text.find(stop[0], start + 1, border)
        return border
