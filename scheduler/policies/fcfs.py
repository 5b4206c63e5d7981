"""First come, first served."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request


class Fcfs:
    """Order of arrival; age is the rank."""

    preempts = False

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        return waiting

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        return None
