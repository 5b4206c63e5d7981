"""Reads what a load will need next into the page cache, in threads beside the one that loads.

A page fault waits for the disk, and lets it rest while weights are converted or copied to a card. These threads keep it
at work, a bounded number of bytes ahead. What several ranks of a machine need is read from the disk once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import NamedTuple

from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.machine import available_memory

THREADS = 4
CHUNK_BYTES = 32 << 20  # what one thread reads from its start to its end, so that the kernel sees how it goes on
REQUEST_BYTES = 1 << 20
AHEAD_BYTES = 512 << 20  # so that the disk has work while a large weight is converted or copied to a card
FREE_SHARE = 1 / 16  # of the free memory, the most that one rank's threads fill
PROBE_BYTES = 256 << 10
SCRATCH_BYTES = 128 << 10


class Span(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    stop: int


class _Chunk(NamedTuple):
    """end: where it ends among the bytes of all spans."""

    span: Span
    end: int


class ReadAhead:
    """Threads that read `spans` in their order while it is entered."""

    def __init__(self, spans: Mapping[str, Span]) -> None:
        self._change = Condition()
        self._chunks: list[_Chunk] = []
        self._origins: dict[str, int] = {}  # of a span's file, among the bytes of all spans
        end = 0
        for name, (path, start, stop) in spans.items():
            self._origins[name] = end - start
            while start < stop:
                after = min(stop, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
                end += after - start
                self._chunks.append(_Chunk(Span(path, start, after), end))
                start = after
        self._next = 0
        self._limit = min(AHEAD_BYTES, int(available_memory().value * FREE_SHARE))
        self._may_read = self._limit  # where that ends
        self._failed: WeightsError | None = None
        self._closed = False
        self._threads = [Thread(target=self._work, name="read-ahead", daemon=True) for _ in range(THREADS)]

    def reached(self, name: str, stop: int) -> None:
        """What comes before byte `stop` of the file with the span `name` is wanted now, or was before.

        Raises WeightsError for what could not be read.
        """
        with self._change:
            if self._failed is not None:
                raise self._failed
            self._may_read = max(self._may_read, self._origins[name] + stop + self._limit)
            self._change.notify_all()

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        while (span := self._take()) is not None:
            try:
                bring_in(span, scratch)
            except OSError as error:
                failed = WeightsError(f"{span.path} cannot be read: {error}; download it again")
                with self._change:
                    self._failed = self._failed or failed

    def _take(self) -> Span | None:
        """The next, once it may be read; None at the end."""
        with self._change:
            while not self._closed and self._failed is None and self._next < len(self._chunks):
                chunk = self._chunks[self._next]
                if chunk.end <= self._may_read:
                    self._next += 1
                    return chunk.span
                self._change.wait()
        return None


def bring_in(span: Span, scratch: memoryview) -> None:
    """Wait until the page cache has `span`. Raises OSError, also when the file ends in it."""
    with span.path.open("rb", buffering=0) as file:
        if _cached(file.fileno(), span, scratch):
            return
        place = span.start
        while place < span.stop:
            # All in one buffer, over each other, so that it stays in the core's cache.
            whole, rest = divmod(min(REQUEST_BYTES, span.stop - place), len(scratch))
            count = os.preadv(file.fileno(), [*[scratch] * whole, scratch[:rest]], place)
            if not count:
                raise OSError(f"it ends at byte {place}")
            place += count


def _cached(file: int, span: Span, scratch: memoryview) -> bool:
    """Whether pages of it here and there are there, which costs less than to copy them all."""
    if not hasattr(os, "RWF_NOWAIT"):  # as on macOS
        return False
    try:
        return all(
            os.preadv(file, [scratch[:1]], place, os.RWF_NOWAIT)
            for place in (*range(span.start, span.stop, PROBE_BYTES), span.stop - 1)
        )
    except OSError:  # it is not, or the file system does not tell
        return False
