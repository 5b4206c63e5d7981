"""A file with every input of the core and a digest of every decision, so that a run can be repeated exactly.

The file is a sequence of frames, each a 4-byte little-endian length and one msgpack message: a `TraceHeader`, then the
events in order. A file cut off in the middle of a frame is read up to there. Prompts are in it as they came: treat a
trace like the requests themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.messages import AddRequest, Message, PagesMoved, StepResult
from vibe_sgl_lite.runtime.observer_file import ObserverFile
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.observer import Call
from vibe_sgl_lite.scheduler.tiers.disk import TierContents

TRACE_VERSION = 3
DIGEST_BYTES = 8
LENGTH_BYTES = 4


class TraceHeader(Message, frozen=True):
    version: int
    config: SchedulerConfig


class Event(Message, frozen=True):
    """A call of the core: its arguments by position, and a digest of its decision."""

    call: Call
    args: tuple[AddRequest | StepResult | PagesMoved | TierContents | int | float | str | bool, ...]
    digest: bytes


_encoder = msgspec.msgpack.Encoder()


def digest_of(decision: object) -> bytes:
    """Eight bytes that stand for a batch, outputs, a refusal or a number; empty for none."""
    if decision is None:
        return b""
    return hashlib.blake2b(_encoder.encode(decision), digest_size=DIGEST_BYTES).digest()


class TraceWriter:
    """A scheduler observer that writes the trace. Raises ConfigError when the file cannot be made."""

    def __init__(self, path: str | Path, config: SchedulerConfig) -> None:
        try:
            self._file = ObserverFile(path)
        except OSError as error:
            raise ConfigError(f"trace={str(path)!r}: {error.strerror}; name a file that can be written") from error
        self._write(TraceHeader(TRACE_VERSION, config))

    def observe(self, call: Call, args: tuple[Any, ...], decision: object, newest: Step | None) -> None:
        self._write(Event(call, args, digest_of(decision)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Message) -> None:
        frame = _encoder.encode(event)
        self._file.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)


def read_trace(path: str | Path) -> tuple[SchedulerConfig, Iterator[Event]]:
    """The core's settings and the events. Raises ConfigError when the file is no trace of this version."""
    frames = _frames(path)
    try:
        header = msgspec.msgpack.decode(next(frames), type=TraceHeader)
    except (OSError, StopIteration, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is no scheduler trace: {error}") from error
    if header.version != TRACE_VERSION:
        raise ConfigError(f"{str(path)!r} is a trace of version {header.version}, this program reads {TRACE_VERSION}")
    decoder = msgspec.msgpack.Decoder(Event)
    return header.config, (decoder.decode(frame) for frame in frames)


def _frames(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while len(head := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
            size = int.from_bytes(head, "little")
            frame = file.read(size)
            if len(frame) < size:
                return
            yield frame
