"""Where a rank's time goes, part by part, while a profile is taken.

Shared by `--profile` and benchmarks/internal/cpu_step.py.

What runs a part marks where it begins (qwen3/layers/part_timer.py); a rank without a profile has a timer that does
nothing. Each moment belongs to one part, so the parts of a step add up to the step. Times are the host's; of a device
that works behind its back: gpu/device_timer.py.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer

COLLECTIVES = "collectives"


class StepTimer(PartTimer):
    """Whose the time was, from one moment to the next. For one thread. clock: in seconds, as the timelines' own."""

    measures = True

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.names = [OTHER]  # in the order in which they came
        self._current = 0
        self._owners = [0]  # owners[i] has the time from times[i] to times[i + 1]
        self._times = [clock()]

    @property
    def began(self) -> float:
        """When the last take was over."""
        return self._times[0]

    def mark(self, part: str) -> None:
        self._current = self._index(part)
        self._owners.append(self._current)
        self._times.append(self._clock())

    def spread(self, parts: Sequence[str], seconds: Callable[[], Iterable[float]]) -> None:
        time = self._times[-1]
        for part, duration in zip(parts, seconds(), strict=True):
            self._owners.append(self._index(part))
            self._times.append(time)
            time += duration
        self._current = 0
        self._owners.append(0)
        self._times.append(time)

    def inside(self, part: str, call: Callable[..., Tensor], *args: Any) -> Tensor:
        """Make the call; its time is that part's, and what comes after is whose it was before."""
        outer = self.names[self._current]
        self.mark(part)
        try:
            return call(*args)
        finally:
            self.mark(outer)

    def _index(self, part: str) -> int:
        if part not in self.names:
            self.names.append(part)
        return self.names.index(part)

    def take_segments(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(indices into `names`, seconds) of every stretch since `began`, in order; then begins anew."""
        self._times.append(self._clock())
        owners, seconds = np.array(self._owners), np.diff(np.array(self._times))
        self._owners[:] = [self._current]
        self._times[:] = [self._clock()]  # the taking itself is nobody's
        return owners, seconds

    def take(self) -> dict[str, float]:
        """Seconds since `began`, by part, in the order of `names` with OTHER last; then begins anew.

        They add up to all of that time; but what taking takes is in neither this one nor the next.
        """
        owners, seconds = self.take_segments()
        sums = np.bincount(owners, weights=seconds, minlength=len(self.names)).tolist()
        return {name: s for name, s in [*zip(self.names[1:], sums[1:], strict=True), (OTHER, sums[0])] if s > 0}


@dataclass(frozen=True)
class TimedGroup(Group):
    """A group whose collectives are timed, waiting for the other ranks included."""

    timer: StepTimer = field(kw_only=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._timed(super().all_reduce, x)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._timed(super().all_reduce_max, x)

    def all_reduce_min(self, x: Tensor) -> Tensor:
        return self._timed(super().all_reduce_min, x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._timed(super().all_gather, x)

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        return self._timed(super().all_to_all, x, send_rows, receive_rows)

    def _timed(self, call: Callable[..., Tensor], *args: Any) -> Tensor:
        return self.timer.inside(COLLECTIVES, call, *args)


def time_collectives(parallel: ParallelState, timer: StepTimer) -> ParallelState:
    """The same groups, timed; those of one rank do nothing and stay as they are."""

    def timed(group: Group) -> Group:
        place = group.rank, group.size, group.process_group, group.peers
        return TimedGroup(*place, timer=timer) if group.size > 1 else group

    return replace(parallel, tp=timed(parallel.tp), ep=timed(parallel.ep), expert_tp=timed(parallel.expert_tp))
