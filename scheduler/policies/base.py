"""What a scheduling policy decides, and nothing else: who is next, and who may be pushed aside for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request


class SchedulePolicy(Protocol):
    """A policy keeps no state about requests; equal input gives equal output.

    Aging: every second of waiting improves a request's rank by a fixed amount, so that what arrives later can overtake
    it only for a bounded time, and none starves. Only differences in age count: a long queue as such changes nothing.

    preempts: `victim` may name somebody.
    """

    preempts: bool

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        """The waiting requests, the next to run first. `waiting` is in order of arrival. `now` in seconds."""
        ...

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        """Whom to retract so that `candidate`, for which there is no room, can run; None: it waits."""
        ...
