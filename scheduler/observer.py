"""Watching a core from outside: every input and every decision, in order, to whoever wants to know.

`ObservedScheduler` has the core's interface and hands each call on; the observers are told afterwards. The trace
(scheduler/tools/trace.py) and the timeline (scheduler/tools/timeline.py) are such observers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vibe_sgl_lite.runtime.messages import AddRequest, ForwardBatch, RequestRejected, StepResult
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.results import Outputs


class SchedulerObserver(Protocol):
    """Called after the core has acted. `now`: the time the core was given, in seconds."""

    def added(self, message: AddRequest, now: float, rejected: RequestRejected | None) -> None: ...

    def aborted(self, uid: int, now: float, outputs: Outputs) -> None: ...

    def stop_matched(self, uid: int, now: float) -> None: ...

    def expired(self, now: float, outputs: Outputs) -> None: ...

    def scheduled(self, now: float, batch: ForwardBatch | None, step: Step | None) -> None: ...

    def completed(self, result: StepResult, now: float, step: Step, outputs: Outputs) -> None: ...

    def ranks_lost(self, epoch: int, now: float, outputs: Outputs) -> None: ...

    def ranks_ready(self, num_pages: int, now: float, outputs: Outputs) -> None: ...

    def flushed(self, freed: int | None) -> None: ...

    def close(self) -> None: ...


class ObservedScheduler:
    """A core whose calls are watched. With no observers it costs a call more, so use the core itself then."""

    def __init__(self, core: Scheduler, observers: Sequence[SchedulerObserver]) -> None:
        self.core = core
        self._observers = observers

    def add(self, message: AddRequest, now: float) -> RequestRejected | None:
        rejected = self.core.add(message, now)
        for observer in self._observers:
            observer.added(message, now, rejected)
        return rejected

    def abort(self, uid: int, now: float) -> Outputs:
        outputs = self.core.abort(uid, now)
        for observer in self._observers:
            observer.aborted(uid, now, outputs)
        return outputs

    def stop_matched(self, uid: int, now: float) -> None:
        self.core.stop_matched(uid, now)
        for observer in self._observers:
            observer.stop_matched(uid, now)

    def expire(self, now: float) -> Outputs:
        outputs = self.core.expire(now)
        if outputs:
            for observer in self._observers:
                observer.expired(now, outputs)
        return outputs

    def schedule(self, now: float) -> ForwardBatch | None:
        if not self.core.can_schedule:
            return None  # no decision, so nothing to tell
        batch = self.core.schedule(now)
        step = self.core.newest_step if batch is not None else None
        for observer in self._observers:
            observer.scheduled(now, batch, step)
        return batch

    def complete(self, result: StepResult, now: float) -> Outputs:
        if self.core.is_stale(result):
            return Outputs()  # of ranks that are lost: nothing to tell
        step = self.core.oldest_step
        outputs = self.core.complete(result, now)
        assert step is not None
        for observer in self._observers:
            observer.completed(result, now, step, outputs)
        return outputs

    def lose_ranks(self, epoch: int, now: float) -> Outputs:
        outputs = self.core.lose_ranks(epoch, now)
        for observer in self._observers:
            observer.ranks_lost(epoch, now, outputs)
        return outputs

    def ranks_ready(self, num_pages: int, now: float) -> Outputs:
        outputs = self.core.ranks_ready(num_pages, now)
        for observer in self._observers:
            observer.ranks_ready(num_pages, now, outputs)
        return outputs

    def flush_cache(self) -> int | None:
        freed = self.core.flush_cache()
        for observer in self._observers:
            observer.flushed(freed)
        return freed

    def stats(self) -> dict[str, int | float | str | bool]:
        return self.core.stats()

    @property
    def next_deadline(self) -> float:
        return self.core.next_deadline

    @property
    def client_requests(self) -> list[int]:
        return self.core.client_requests

    @property
    def oldest_step(self) -> Step | None:
        return self.core.oldest_step

    @property
    def winding_down(self) -> bool:
        return self.core.winding_down

    def close(self) -> None:
        """Finish the observers' files."""
        for observer in self._observers:
            observer.close()
