"""What every message is made of: the tagged base, and ids as packed int32 bytes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from struct import unpack

import msgspec


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids, page ids, slots ... as int32 bytes."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises ValueError when the length is no multiple of 4."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


def split_ids(data: bytes) -> tuple[bytes, ...]:
    """Each id's own 4 bytes. Raises struct.error when the length is no multiple of 4."""
    return unpack("4s" * (len(data) // 4), data)


def numbers_from_now() -> int:
    """Where the numbers of requests and questions begin that a process gives from now on: beyond all that were given
    before, a million a second at most, by it or one in its place. All processes of a machine share this clock."""
    return time.monotonic_ns() // 1000


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every message: the first array element is the class name."""
