"""The waiting queue: requests without a slot, in order of arrival. A retracted request comes back to its old place."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from vibe_sgl_lite.scheduler.request import Request


def _seq(request: Request) -> int:
    return request.seq


class WaitingQueue:
    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.num_bytes = 0  # of their token ids

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        assert not request.queued
        request.queued = True
        self.num_bytes += len(request.tokens)
        insort(self._requests, request, key=_seq)

    def remove(self, request: Request) -> None:
        assert request.queued
        request.queued = False
        self.num_bytes -= len(request.tokens)
        index = bisect_left(self._requests, request.seq, key=_seq)
        assert self._requests[index] is request
        del self._requests[index]

    def snapshot(self) -> list[Request]:
        return list(self._requests)
