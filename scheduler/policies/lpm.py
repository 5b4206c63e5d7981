"""Longest cached prefix first: what is cached is used before it is evicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request

MOST_WAITING = 128  # looking all of them up costs more than it brings beyond this: order of arrival for that pass
TOKENS_PER_SECOND = 100.0  # aging: a second of waiting is worth so many cached tokens


class LongestPrefixMatch:
    """Cached tokens plus age; ties by arrival."""

    preempts = False

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        if len(waiting) > MOST_WAITING:
            return waiting
        rank = {r.uid: memory.cached_length(r) + TOKENS_PER_SECOND * (now - r.arrival) for r in waiting}
        return sorted(waiting, key=lambda r: (-rank[r.uid], r.seq))

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        return None
