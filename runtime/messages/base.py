"""What every message is made of: the tagged base, and ids as packed int32 bytes."""

from __future__ import annotations

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


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every message: the first array element is the class name."""
