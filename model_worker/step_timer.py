"""Where a rank's time goes, part by part, while a profile is taken.

Shared by `--profile` and benchmarks/internal/cpu_step.py.

Parts are timed by replacing them, on the objects that hold them, with callables that note when they begin and end. A
rank without a profile replaces nothing and pays nothing. Each moment belongs to one part, the innermost that runs, so
the parts of a step add up to the step. Times are the host's: where a device works behind its back, they say how long
the host took to ask for the work, and how long it waited.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vibe_sgl_lite.model_worker.attention.cpu_backend import KernelAttention
from vibe_sgl_lite.model_worker.cpu.fused_layers import FusedLayers
from vibe_sgl_lite.model_worker.cpu.layers import PARTS
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.mlp import MLP

OTHER = "other"  # what no part claims: Python between the calls, mostly
COLLECTIVES = "collectives"
# The names of the model's element-wise operations in a profile; one that is not here keeps its own.
OPERATIONS = {"add_rms_norm": "norm", "silu_multiply": "silu"}


class StepTimer:
    """Whose the time was, from one moment to the next. For one thread. clock: in seconds, as the timelines' own."""

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

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time owned by `part`, but for what timed calls inside it own."""
        if part not in self.names:
            self.names.append(part)
        mine, owners, times, clock = self.names.index(part), self._owners, self._times, self._clock

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self._current = self._current, mine
            owners.append(mine)
            times.append(clock())
            try:
                return call(*args, **kwargs)
            finally:
                owners.append(outer)
                times.append(clock())
                self._current = outer

        return run

    def timed_inside(
        self, parts: Sequence[str], call: Callable[..., Any], seconds: Callable[[], Iterable[float]]
    ) -> Callable[..., Any]:
        """`call`, which runs `parts` one after another and tells by `seconds` how long each took the last time."""
        self.names += [part for part in dict.fromkeys(parts) if part not in self.names]
        indices = [self.names.index(part) for part in parts]

        def run(*args: Any, **kwargs: Any) -> Any:
            time = self._clock()
            result = call(*args, **kwargs)
            for index, duration in zip(indices, seconds(), strict=True):
                self._owners.append(index)
                self._times.append(time)
                time += duration
            self._owners.append(self._current)
            self._times.append(time)
            return result

        return run

    def attach(self, owner: object, attribute: str, part: str) -> None:
        """From now on, what `owner` calls under that name is timed. Of an object that is called, only calls remain."""
        setattr(owner, attribute, self.timed(part, getattr(owner, attribute)))

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
        result: Tensor = self.timer.timed(COLLECTIVES, call)(*args)
        return result


def time_collectives(parallel: ParallelState, timer: StepTimer) -> ParallelState:
    """The same groups, timed; those of one rank do nothing and stay as they are."""

    def timed(group: Group) -> Group:
        return TimedGroup(group.rank, group.size, group.process_group, timer=timer) if group.size > 1 else group

    return replace(parallel, tp=timed(parallel.tp), ep=timed(parallel.ep), expert_tp=timed(parallel.expert_tp))


def time_parts(runner: ModelRunner, timer: StepTimer) -> None:
    """Time a runner's steps from now on. Once, after the weights are loaded."""
    model, backend = runner.model, runner.backend
    timer.attach(runner, "apply", "apply")
    timer.attach(runner.slots, "prepare", "prepare")
    timer.attach(model, "embedding", "embedding")
    layers = [(layer.attention, layer.feed_forward) for layer in model.layers]
    for attention, _ in layers:
        timer.attach(attention, "qkv", "qkv")
    timer.attach(model, "rotary", "rope")
    if isinstance(backend, KernelAttention):
        timer.attach(backend.kernels, "qkv_rope_store", "rope")
    timer.attach(backend, "forward", "attention")
    for attention, _ in layers:
        timer.attach(attention, "output", "o")
    for name in vars(LayerOperations):
        if not name.startswith("_"):
            timer.attach(model.operations, name, OPERATIONS.get(name, name))
    for _, feed_forward in layers:
        if isinstance(feed_forward, MLP):
            timer.attach(feed_forward, "gate_up", "gate_up")
            timer.attach(feed_forward, "down", "down")
        else:
            timer.attach(feed_forward.router.weight, "multiply", "router")
            timer.attach(feed_forward.experts.gate_up, "multiply_grouped", "gate_up")
            timer.attach(feed_forward.experts.down, "multiply_grouped", "down")
    if isinstance(model.all_layers, FusedLayers):
        _time_fused(model.all_layers, timer)
    timer.attach(model, "head", "head")
    for owner, attribute in (
        (runner.prompt_logprobs, "of_step"),
        (runner.constraints, "begin"),
        (runner.sampler, "sample"),
        (runner.slots, "append"),
    ):
        timer.attach(owner, attribute, "sampling")
    timer.take()


def _time_fused(fused: FusedLayers, timer: StepTimer) -> None:
    fused.layers.measure()
    seconds = fused.layers.seconds
    assert seconds is not None
    fused.layers = timer.timed_inside(PARTS * len(seconds), fused.layers, seconds.ravel().tolist)  # type: ignore[assignment]
