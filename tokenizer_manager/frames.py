"""Whether a frame from a client may be decoded: one byte can stand for a list, and a list costs a hundred times more.

Goes over the msgpack structure without making objects of it; texts are stepped over, so their length costs nothing.
"""

from __future__ import annotations

MAX_VALUES = 50_000  # in one frame: numbers, texts, lists, maps and what is in them; 10 ms to count so many


def has_few_values(frame: bytes, most: int = MAX_VALUES) -> bool:
    """Whether `frame` holds at most `most` values, and bytes enough for every value that its headers announce."""
    place, size = 0, len(frame)
    due = 1  # values announced and not met yet
    for _ in range(most):
        if due == 0:
            return True
        if due > size - place:
            return False
        kind = frame[place]
        due -= 1
        if kind < 0x80 or kind >= 0xE0:
            place += 1
        elif kind < 0x90:
            due += 2 * (kind & 0x0F)
            place += 1
        elif kind < 0xA0:
            due += kind & 0x0F
            place += 1
        elif kind < 0xC0:
            place += 1 + (kind & 0x1F)
        elif kind in _LENGTHS:
            width, extra = _LENGTHS[kind]
            place += 1 + width + extra + int.from_bytes(frame[place + 1 : place + 1 + width], "big")
        elif kind in _COUNTS:
            width, each = _COUNTS[kind]
            due += each * int.from_bytes(frame[place + 1 : place + 1 + width], "big")
            place += 1 + width
        else:
            place += 1 + _FIXED.get(kind, 0)
    return due == 0


def short_rid(frame: bytes, most: int) -> str | None:
    """The first `most` bytes, as text, of the rid of a frame that begins as a `Generate`; None for any other frame."""
    place = 1 if frame[:1] and 0x90 <= frame[0] < 0xA0 else _COUNTS[frame[0]][0] + 1 if frame[:1] in _ARRAYS else 0
    if place == 0 or frame[place : place + len(_GENERATE)] != _GENERATE:
        return None
    place += len(_GENERATE)
    kind = int.from_bytes(frame[place : place + 1], "big")
    if 0xA0 <= kind < 0xC0:
        width, length = 0, kind & 0x1F
    elif 0xD9 <= kind <= 0xDB:
        width = _LENGTHS[kind][0]
        length = int.from_bytes(frame[place + 1 : place + 1 + width], "big")
    else:
        return None
    start = place + 1 + width
    if start + length > len(frame):
        return None
    return frame[start : start + min(length, most)].decode(errors="ignore")


_GENERATE = b"\xa8Generate"
_ARRAYS = (b"\xdc", b"\xdd")
# Kinds by their first byte: bytes of the length or count that follows, and what goes with it.
_LENGTHS = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_LENGTHS |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_COUNTS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
