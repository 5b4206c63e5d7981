"""Where a GPU's time goes, part by part, while a profile is taken: by CUDA events, in captured graphs too."""

import time
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vibe_sgl_lite.model_worker.step_timer import StepTimer
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER

Result = TypeVar("Result")


class TimedEvent(Protocol):
    """What is used of a `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float:
        """Milliseconds until `end`."""
        ...


Mark = tuple[int, TimedEvent]  # a part's index in `names`, and where it begins


def _cuda_event() -> TimedEvent:
    """In a graph that is being captured, one that each replay records anew."""
    external = torch.cuda.is_current_stream_capturing()
    event: TimedEvent = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
    return event


class DeviceTimer(StepTimer):
    """A `StepTimer` for steps that a GPU runs one at a time.

    From a step's first `on_device` on, marks are events on the current stream, until the next `take`: the time between
    two of them is the part's. `take` waits for the last one, which a step whose results are there has passed.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, new_event: Callable[[], TimedEvent] = _cuda_event
    ) -> None:
        super().__init__(clock)
        self._new_event = new_event
        self._captured: dict[Hashable, list[Mark]] = {}
        self._step: list[Mark] | None = None  # marks of what is enqueued, in order
        self._into: list[Mark] = []  # where the next mark goes

    def mark(self, part: str) -> None:
        if self._step is None:
            super().mark(part)
            return
        self._current = self._index(part)
        event = self._new_event()
        event.record()
        self._into.append((self._current, event))

    def on_device(
        self, key: Hashable, work: Callable[[], Result], run: Callable[[Callable[[], Result]], Result]
    ) -> Result:
        if self._step is None:
            super().mark(OTHER)
            self._step = self._into = []
        step, calls = self._step, list[list[Mark]]()

        def marked() -> Result:
            self._into = []
            calls.append(self._into)
            self.mark(OTHER)
            try:
                return work()
            finally:
                self._into = step

        result = run(marked)
        if len(calls) > 1:  # the last was captured, and has not run
            self._captured[key] = calls[-1]
        step += calls[0] if calls else self._captured[key]
        self.mark(OTHER)
        return result

    def take_segments(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        step, self._step = self._step, None
        if step is not None:
            step[-1][1].synchronize()
            seconds = [begin.elapsed_time(end) / 1e3 for (_, begin), (_, end) in pairwise(step)]
            self.spread([self.names[part] for part, _ in step[:-1]], lambda: seconds)
        return super().take_segments()
