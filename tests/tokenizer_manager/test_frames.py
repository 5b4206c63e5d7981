"""What is counted in a frame before it is decoded, against a decoder that counts afterwards."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_sgl_lite.tokenizer_manager.frames import MAX_VALUES, has_few_values, short_rid

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=300)
    | st.sampled_from(["x" * 300, "x" * 70_000, b"x" * 70_000])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=20)
)


def count(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    if isinstance(value, dict):
        return 1 + sum(1 + count(inner) for inner in value.values())
    return 1


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_counts_what_is_there(value: Any) -> None:
    frame = msgspec.msgpack.encode(value)
    values = count(value)
    assert has_few_values(frame, values)
    assert not has_few_values(frame, values - 1)


@pytest.mark.parametrize("size", [15, 16, 65_535, 65_536])
def test_long_lists_and_maps(size: int) -> None:
    for value in (list(range(size)), dict.fromkeys(map(str, range(size)))):
        frame = msgspec.msgpack.encode(value)
        assert has_few_values(frame, count(value))
        assert not has_few_values(frame, count(value) - 1)


@pytest.mark.parametrize("data", [b"\xc7\x03\x01abc", b"\xc8\x00\x03\x01abc", b"\xc9\x00\x00\x00\x03\x01abc",
    b"\xd4\x01a", b"\xd5\x01ab", b"\xd6\x01abcd", b"\xd7\x01abcdefgh", b"\xd8\x01" + b"a" * 16])  # fmt: skip
def test_extension_types(data: bytes) -> None:
    assert isinstance(msgspec.msgpack.decode(data), msgspec.msgpack.Ext)
    assert has_few_values(b"\x92" + data + b"\x01", 3)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes(frame: bytes) -> None:
    """Nothing that can be decoded is refused, and nothing raises."""
    few = has_few_values(frame)
    try:
        msgspec.msgpack.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, TypeError, RecursionError):
        return
    assert few


def test_an_announcement_without_bytes_is_refused_before_memory_is_taken() -> None:
    assert not has_few_values(b"\xdd\xff\xff\xff\xff")
    assert not has_few_values(b"\x91\xdf\xff\xff\xff\xff" + b"\xc0" * 1000)


def test_a_frame_of_empty_lists_takes_no_time() -> None:
    frame = msgspec.msgpack.encode([[[]] * 1_480_000])
    start = time.process_time()
    assert not has_few_values(frame)
    assert time.process_time() - start < 0.5
    assert not has_few_values(msgspec.msgpack.encode([0] * MAX_VALUES))


@pytest.mark.parametrize("rid", ["r", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 70_000, "\u00e9" * 200, ""])
@pytest.mark.parametrize("others", [1, 14, 70_000])
def test_the_rid_of_a_frame_that_is_not_decoded(rid: str, others: int) -> None:
    frame = msgspec.msgpack.encode(["Generate", rid, *[0] * others])
    short = short_rid(frame, 256)
    assert short is not None
    assert rid.startswith(short)
    assert len(short.encode()) >= min(255, len(rid.encode()))
    for cut in (0, 1, 3, 9, 10, 11, 12, 13):
        assert short_rid(frame[:cut], 256) is None or cut > 10 + len(rid)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_have_a_rid_or_none(frame: bytes) -> None:
    for prefix in (b"", b"\x93\xa8Generate", b"\xdc\x00\x03\xa8Generate"):
        rid = short_rid(prefix + frame, 256)
        assert rid is None or len(rid.encode()) < len(frame)


def test_other_frames_have_no_rid() -> None:
    for value in (["Abort", "r"], ["Generate", 5], ["Generate"], ["Generate", b"r"], {"Generate": "r"}, "Generate"):
        assert short_rid(msgspec.msgpack.encode(value), 256) is None
