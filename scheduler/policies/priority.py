"""Higher priority first, then arrival; a running request of lower priority makes room for a waiting one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request

SECONDS_PER_LEVEL = 30.0  # aging: so long a wait is worth one level of priority


class Priority:
    """Order by priority plus age. Preemption looks at the given priorities alone, so that equals never swap places."""

    preempts = True

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        return sorted(waiting, key=lambda r: (-(r.priority + (now - r.arrival) / SECONDS_PER_LEVEL), r.seq))

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        lower = [r for r in running if r.priority < candidate.priority and not r.guaranteed]
        return min(lower, key=lambda r: (r.priority, r.num_generated, -r.seq), default=None)
