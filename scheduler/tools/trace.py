"""A file with every input of the core and a digest of every decision, so that a run can be repeated exactly.

The file is a sequence of frames, each a 4-byte little-endian length and one msgpack message: a `TraceHeader`, then the
events in order. A file cut off in the middle of a frame is read up to there. Prompts are in it as they came: treat a
trace like the requests themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.messages import AddRequest, ForwardBatch, Message, RequestRejected, StepResult
from vibe_sgl_lite.runtime.observer_file import ObserverFile
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.results import Outputs

TRACE_VERSION = 1
DIGEST_BYTES = 8
LENGTH_BYTES = 4


class TraceHeader(Message, frozen=True):
    version: int
    config: SchedulerConfig


class Added(Message, frozen=True):
    now: float
    message: AddRequest
    digest: bytes


class Aborted(Message, frozen=True):
    now: float
    uid: int
    digest: bytes


class StopSeen(Message, frozen=True):
    now: float
    uid: int


class Expired(Message, frozen=True):
    """Deadlines that came; only when they ended something."""

    now: float
    digest: bytes


class Scheduled(Message, frozen=True):
    """digest: of the batch's bytes; empty when there was no batch."""

    now: float
    digest: bytes


class Completed(Message, frozen=True):
    """digest: of the outputs."""

    now: float
    result: StepResult
    digest: bytes


class Flushed(Message, frozen=True):
    freed: int | None


class RanksDied(Message, frozen=True):
    now: float
    epoch: int
    digest: bytes


class RanksCame(Message, frozen=True):
    now: float
    num_pages: int
    digest: bytes


TraceEvent = Added | Aborted | StopSeen | Scheduled | Completed | Flushed | Expired | RanksDied | RanksCame

_encoder = msgspec.msgpack.Encoder()


def digest_of(decision: msgspec.Struct | None) -> bytes:
    """Eight bytes that stand for a batch, outputs or a refusal; empty for none."""
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

    def added(self, message: AddRequest, now: float, rejected: RequestRejected | None) -> None:
        self._write(Added(now, message, digest_of(rejected)))

    def aborted(self, uid: int, now: float, outputs: Outputs) -> None:
        self._write(Aborted(now, uid, digest_of(outputs)))

    def stop_matched(self, uid: int, now: float) -> None:
        self._write(StopSeen(now, uid))

    def expired(self, now: float, outputs: Outputs) -> None:
        self._write(Expired(now, digest_of(outputs)))

    def scheduled(self, now: float, batch: ForwardBatch | None, step: Step | None) -> None:
        self._write(Scheduled(now, digest_of(batch)))

    def completed(self, result: StepResult, now: float, step: Step, outputs: Outputs) -> None:
        self._write(Completed(now, result, digest_of(outputs)))

    def ranks_lost(self, epoch: int, now: float, outputs: Outputs) -> None:
        self._write(RanksDied(now, epoch, digest_of(outputs)))

    def ranks_ready(self, num_pages: int, now: float, outputs: Outputs) -> None:
        self._write(RanksCame(now, num_pages, digest_of(outputs)))

    def flushed(self, freed: int | None) -> None:
        self._write(Flushed(freed))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Message) -> None:
        frame = _encoder.encode(event)
        self._file.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)


def read_trace(path: str | Path) -> tuple[SchedulerConfig, Iterator[TraceEvent]]:
    """The core's settings and the events. Raises ConfigError when the file is no trace of this version."""
    frames = _frames(path)
    try:
        header = msgspec.msgpack.decode(next(frames), type=TraceHeader)
    except (OSError, StopIteration, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is no scheduler trace: {error}") from error
    if header.version != TRACE_VERSION:
        raise ConfigError(f"{str(path)!r} is a trace of version {header.version}, this program reads {TRACE_VERSION}")
    decoder = msgspec.msgpack.Decoder(TraceEvent)
    return header.config, (decoder.decode(frame) for frame in frames)


def _frames(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while len(head := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
            size = int.from_bytes(head, "little")
            frame = file.read(size)
            if len(frame) < size:
                return
            yield frame
