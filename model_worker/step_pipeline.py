"""A rank's steps in flight: launched as they come, collected in order."""

from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.pending_step import PendingStep
from vibe_sgl_lite.model_worker.rank_digest import RankDigest
from vibe_sgl_lite.model_worker.step_timer import StepTimer
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER
from vibe_sgl_lite.runtime.messages import (
    ForwardBatch,
    StepResult,
    StepTimes,
)

MAX_IN_FLIGHT = 3  # steps: one runs while the next ones wait on the device; the scheduler sends no more


class StepPipeline:
    """Launches steps as they come and hands on their results, the earliest first, with at most three in flight.

    With a digest, makes sure that all ranks do the same; with a timer, tells where the time went. Either takes steps
    one at a time.
    """

    def __init__(
        self,
        runner: ModelRunner,
        send: Callable[[StepResult], None],
        digest: RankDigest | None = None,
    ) -> None:
        """send: called with every result, in order. The runner's timer, if it is a `StepTimer`, times all of it."""
        self.timer = runner.timer
        if isinstance(self.timer, StepTimer):
            self.timer.mark(OTHER)
            self.timer.take()  # what the start took belongs to no step
        self._runner = runner
        self._send = send
        self._digest = digest
        self.device = runner.device
        self._in_flight: deque[PendingStep] = deque()

    def launch(self, batch: ForwardBatch) -> None:
        """Run the batch; hand on what is done. Raises RuntimeError when the ranks disagree: before the step about its
        batch, after it about its tokens."""
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._collect()
        if self._digest is not None:
            self._digest.check(batch.step, "batch", msgspec.msgpack.encode(batch))
        between = self.timer.take() if isinstance(self.timer, StepTimer) else {}
        began = self.timer.began if isinstance(self.timer, StepTimer) else 0.0
        self._in_flight.append(self._runner.launch(batch))
        if self._digest is not None or self.timer.measures:
            self._collect(began, between)
        self.collect_done()

    def collect_done(self) -> None:
        """Hand on the results of the steps that are done."""
        while self._in_flight and self._in_flight[0].done():
            self._collect()

    def idle(self) -> None:
        """No step has come for a while: the moment for what would only disturb one."""
        if not self._in_flight:
            self._runner.idle()

    def _collect(self, began: float = 0.0, between: Mapping[str, float] | None = None) -> None:
        result = self._runner.collect(self._in_flight.popleft())
        if self._digest is not None:
            self._digest.check(result.step, "sample", result.token_ids)
        if isinstance(self.timer, StepTimer) and between is not None:
            result = msgspec.structs.replace(result, times=StepTimes(began, dict(between), self.timer.take()))
        self.timer.mark("send")
        self._send(result)
        self.timer.mark(OTHER)
