"""What stops the steps for a while: pauses, new weights, sleep. Their protocol with the ranks and the launcher.

    wait ──the core is quiet──▶ ranks ──RankDone, RankReady──▶ launcher ──WeightsKept──▶ answered

One thing at a time, in the order in which clients ask; only a pause takes effect while another waits for running
requests. What needs a pause and finds none makes one of its own, which ends with it.

New weights are in force when the launcher has them for ranks that start later. Until then no step is sent, and whatever
dies meanwhile starts again with those before: the number in `RankReady` tells which it has become.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import msgspec

from vibe_sgl_lite.runtime.errors import EngineError, RequestError, UserError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    ErrorInfo,
    LoadWeights,
    Message,
    RankDone,
    RankReady,
    SchedulerQuery,
    SchedulerReply,
    SleepRank,
    WakeRank,
    Weights,
)
from vibe_sgl_lite.runtime.settings.checkpoint import check_fits
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.results import Outputs
from vibe_sgl_lite.scheduler.state import PauseMode

MAX_CHARS = {"path": 4096, "weight_version": 256}
ONE_NODE = "works on one node alone: the ranks of other nodes would start again with the weights of the start"
NO_TIERS = "does not go with --cache-dir and --hicache-size, whose pages belong to the weights of the start"


class Lines(Protocol):
    """To whom the control speaks."""

    def to_ranks(self, message: Message) -> None: ...

    def to_launcher(self, weights: Weights) -> None: ...

    def reply(self, reply: SchedulerReply) -> None: ...

    def new_weights(self, version: str) -> None:
        """To the detokenizer, behind all that was made before."""
        ...


@dataclass
class _Operation:
    query: SchedulerQuery
    stage: Literal["wait", "ranks", "launcher"] = "wait"
    weights: Weights | None = None  # that are to be in force
    own_pause: bool = False


class Control:
    """For the scheduler's process. weights: in force. sleep_level: 0 while the ranks are awake."""

    def __init__(self, core: Scheduler, spec: PipelineSpec, weights: Weights, lines: Lines) -> None:
        self.weights = weights
        self.sleep_level = 0
        self._core, self._spec, self._lines = core, spec, lines
        self._pauses: list[int] = []  # whose answers are due when the core is quiet
        self._queue: deque[SchedulerQuery] = deque()
        self._operation: _Operation | None = None
        self._group = core.state.epoch  # of the ranks that said last that they are ready
        self._put_to_sleep_again = False  # an answer is to come that no operation waits for

    # --------------------------------------------------------------------------------------------------- what is asked

    def take(self, query: SchedulerQuery, now: float) -> Outputs:
        """Whatever it is, it is answered some time. Returns what it ended."""
        waits = self._operation is None or self._operation.stage == "wait"
        if query.what == "pause" and waits:
            return self._checked(self._pause, query, now)
        self._queue.append(query)
        return Outputs()

    def advance(self, now: float) -> Outputs:
        """Go on as far as possible. Call it when anything has happened; returns what it ended."""
        outputs, core = Outputs(), self._core
        while True:
            if self._pauses and core.quiet:
                for qid in self._pauses:
                    self._lines.reply(SchedulerReply(qid, {"num_paused_requests": len(core.state.requests)}))
                self._pauses.clear()
            if self._operation is None:
                if not self._queue:
                    return outputs
                ended = self._checked(self._begin, self._queue.popleft(), now)
                outputs.opens += ended.opens
                outputs.tokens += ended.tokens
            elif self._operation.stage == "wait" and core.quiet and self._ranks_are_there:
                self._run(self._operation, now)
            else:
                return outputs

    def _checked(self, act: Callable[[SchedulerQuery, float], Outputs], query: SchedulerQuery, now: float) -> Outputs:
        """The answer is the error, if it is the user's."""
        try:
            return act(query, now)
        except UserError as error:
            code = error.code if isinstance(error, RequestError) else RequestError.code
            self._lines.reply(SchedulerReply(query.qid, {}, ErrorInfo(code, str(error), error.field)))
            return Outputs()

    def _pause(self, query: SchedulerQuery, now: float) -> Outputs:
        mode = _mode(query)
        self._pauses.append(query.qid)
        if self._operation is not None:
            self._operation.own_pause = False
        return self._core.pause(mode, now)

    def _begin(self, query: SchedulerQuery, now: float) -> Outputs:
        """Raises UserError."""
        match query.what:
            case "pause":
                return self._pause(query, now)
            case "continue":
                self._core.resume(now)
                error = ErrorInfo(EngineError.code, "continue_generation came before the pause had come about")
                for qid in self._pauses:
                    self._lines.reply(SchedulerReply(qid, {}, error))
                self._pauses.clear()
                self._lines.reply(SchedulerReply(query.qid, {}))
            case "wake" if not self.sleep_level:
                self._lines.reply(SchedulerReply(query.qid, {"weight_version": self.weights.version}))
            case "wake":
                self._operation = _Operation(query, "ranks")
                if self._ranks_are_there:  # else those that come are awake
                    self._lines.to_ranks(WakeRank(self.weights, self._core.state.epoch))
            case "sleep":
                if query.args.get("level") not in (1, 2):
                    raise RequestError(
                        f"level={query.args.get('level')} must be 1, which frees the KV pool, or 2, the weights too",
                        field="level",
                    )
                mode = _mode(query)
                self._refuse_others("sleep")
                return self._hold(_Operation(query), mode, now)
            case "update_weights":
                weights = self._new_weights(query)
                mode = "abort" if query.args.get("abort_all_requests") else "wait"
                return self._hold(_Operation(query, weights=weights), mode, now)
        return Outputs()

    def _hold(self, operation: _Operation, mode: PauseMode, now: float) -> Outputs:
        self._operation = operation
        paused = self._core.state.pause is not None
        operation.own_pause = not paused
        if paused and mode != "abort":
            return Outputs()
        return self._core.pause("keep" if self.sleep_level and mode == "wait" else mode, now)

    def _new_weights(self, query: SchedulerQuery) -> Weights:
        self._refuse_others("update_weights_from_disk")
        args, current = query.args, self.weights
        path, version = args.get("path"), args.get("weight_version")
        for field, value in {"path": path, "weight_version": version}.items():
            most = MAX_CHARS[field]
            text = isinstance(value, str) and 0 < len(value) <= most and value.isprintable()
            if not (text or (field == "weight_version" and value is None)):
                raise RequestError(f"{field} must be a text of 1 to {most} characters", field=field)
        if not args.get("flush_cache", True) and version in (None, current.version):
            raise RequestError(
                "flush_cache=False needs a weight_version of its own: cached prefixes are told apart by it",
                field="flush_cache",
            )
        folder = Path(str(path)).absolute()
        check_fits(self._spec.model, folder)
        return Weights(str(folder), current.version if version is None else str(version), current.number + 1)

    def _refuse_others(self, what: str) -> None:
        """What the engine runs with that does not know of this."""
        if self._spec.args.nnodes > 1:
            raise RequestError(f"{what} {ONE_NODE}", field="nnodes")
        if self._spec.args.cache_dir is not None or self._spec.args.hicache_size:
            raise RequestError(f"{what} {NO_TIERS}", field="cache_dir")

    # ------------------------------------------------------------------------------------------------ ranks, launcher

    @property
    def _ranks_are_there(self) -> bool:
        """Awake or asleep. What is sent before would reach those that are starting, who know of none of it."""
        return self._group == self._core.state.epoch

    def _run(self, operation: _Operation, now: float) -> None:
        """The core is quiet."""
        core, epoch = self._core, self._core.state.epoch
        operation.stage = "ranks"
        if operation.weights is None:
            if not self.sleep_level:
                core.sleep(now)
            self._lines.to_ranks(SleepRank(int(operation.query.args["level"] or 0), epoch))
        elif self.sleep_level == 2:
            self._keep(operation)  # they load them when they wake
        else:
            self._lines.to_ranks(LoadWeights(operation.weights, self.weights, epoch))

    def _keep(self, operation: _Operation) -> None:
        assert operation.weights is not None
        operation.stage = "launcher"
        self._lines.to_launcher(operation.weights)

    def on_done(self, done: RankDone, now: float) -> None:
        if self._put_to_sleep_again:
            self._put_to_sleep_again = False
            return
        operation = self._operation
        assert operation is not None
        assert operation.stage == "ranks"
        if done.error is not None:
            self._finish(done.error, now)
        elif operation.weights is not None:
            self._keep(operation)
        else:
            self.sleep_level = max(self.sleep_level, int(operation.query.args["level"] or 0))
            self._finish(None, now)

    def on_kept(self, number: int, now: float) -> None:
        operation = self._operation
        if operation is not None and operation.weights is not None and operation.weights.number == number:
            self._change(operation.weights, now)
            self._finish(None, now)

    def on_ready(self, ready: RankReady, now: float) -> bool:
        """The ranks woke, or others took their place. Returns whether steps may run."""
        operation, self._group = self._operation, ready.epoch
        if ready.weights.number != self.weights.number:
            self._change(ready.weights, now)
        if operation is not None and operation.stage != "wait":
            if operation.query.what == "wake":
                self.sleep_level = 0
                self._finish(None, now)
            elif operation.weights is None:
                self.sleep_level = max(self.sleep_level, int(operation.query.args["level"] or 0))
                self._finish(None, now)
            elif operation.weights.number == ready.weights.number:
                self._finish(None, now)
            else:
                text = f"ranks died meanwhile; they have weights {self.weights.version!r} as before"
                self._finish(ErrorInfo(EngineError.code, text), now)
        self._put_to_sleep_again = self.sleep_level > 0
        if self.sleep_level:
            self._lines.to_ranks(SleepRank(self.sleep_level, ready.epoch))
        return not self.sleep_level

    def _change(self, weights: Weights, now: float) -> None:
        operation = self._operation
        flush = operation is None or bool(operation.query.args.get("flush_cache", True))
        self._lines.new_weights(weights.version)
        self.weights = weights
        self._core.change_weights(weights.version, flush, now)

    def _finish(self, error: ErrorInfo | None, now: float) -> None:
        operation = self._operation
        assert operation is not None
        self._operation = None
        values = {"weight_version": self.weights.version, "num_paused_requests": len(self._core.state.requests)}
        self._lines.reply(SchedulerReply(operation.query.qid, {} if error else msgspec.to_builtins(values), error))
        if operation.own_pause:
            self._core.resume(now)


def _mode(query: SchedulerQuery) -> PauseMode:
    """Raises RequestError."""
    mode = query.args.get("mode")
    if mode not in get_args(PauseMode):
        raise RequestError(f"mode={mode!r:.80} must be one of {', '.join(get_args(PauseMode))}", field="mode")
    return mode  # type: ignore[return-value]
