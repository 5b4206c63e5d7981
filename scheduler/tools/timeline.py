"""A timeline in Chrome's trace format, for ui.perfetto.dev or chrome://tracing.

Tracks: the scheduler (its work on each batch), the model workers (one span a step, with rows and tokens, and within it
one a part of rank 0's work, as long as all calls of that part together), and one row a request, from its arrival over
its first token to its last output. The scheduler sees all of these, so one file holds them; detokenizer and tokenizer
manager write their own (runtime/chrome_trace.py).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.chrome_trace import REQUESTS, SCHEDULER, SUFFIX, WORKERS, ChromeTrace
from vibe_sgl_lite.runtime.messages import AddRequest, RequestRejected, StepResult, StepTimes
from vibe_sgl_lite.scheduler.batch import Step
from vibe_sgl_lite.scheduler.observer import Call
from vibe_sgl_lite.scheduler.results import Outputs

FILE_NAME = "scheduler" + SUFFIX
OTHER = "other"  # of a step's parts: what none of them claims, so it gets no span

log = logging.getLogger(__name__)


class Timeline:
    """A scheduler observer that writes `folder`/scheduler.trace.json. `clock`: the clock that `now` is read from.

    Raises ConfigError when the file cannot be made.
    """

    def __init__(self, folder: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._trace = ChromeTrace(folder, "scheduler", (SCHEDULER, WORKERS, REQUESTS))
        self._clock = clock
        self._worker_free_at = 0.0
        self._steps: deque[Step] = deque()  # in flight
        self._live: set[int] = set()  # uids of samples without an end
        self._means = {kind: _Mean() for kind in ("decode steps", "steps with prompts")}

    def observe(self, call: Call, args: tuple[Any, ...], decision: Any, newest: Step | None) -> None:
        now: float = args[-1]
        match call:
            case "add":
                self._added(args[0], now, decision)
            case "stop_matched":
                self._stop_matched(args[0], now)
            case "plan" if decision is not None:
                assert newest is not None
                self._steps.append(newest)
                self._span_of_ours(f"schedule {newest.number}", now, new=len(decision.new))
            case "complete" if self._steps and self._steps[0].number == args[0].step:
                self._completed(args[0], now, self._steps.popleft(), decision)
            case "lose_ranks":
                self._trace.event("i", WORKERS, now, name="ranks lost", args={"steps": len(self._steps)})
                self._steps.clear()
            case "ranks_ready":
                self._trace.event("i", WORKERS, now, name="ranks ready", args={"kv_pages": args[0]})
        if isinstance(decision, Outputs):
            self._outputs(decision, now)

    def _added(self, message: AddRequest, now: float, rejected: RequestRejected | None) -> None:
        tokens = len(message.token_ids) // 4
        if rejected is not None:
            self._trace.event("i", REQUESTS, now, name=f"refused: {rejected.error.code}", args={"rid": message.rid})
            return
        for uid in range(message.uid, message.uid + message.sampling.n):
            self._live.add(uid)
            args = {"rid": message.rid, "prompt_tokens": tokens, "max_new_tokens": message.sampling.max_new_tokens}
            self._phase("b", uid, "request", now, args)
            self._phase("b", uid, "waiting and prefill", now)

    def _stop_matched(self, uid: int, now: float) -> None:
        if uid in self._live:
            self._live.remove(uid)
            self._phase("e", uid, "decode", now)
            self._phase("e", uid, "request", now, {"finish": "stop string"})

    def _completed(self, result: StepResult, now: float, step: Step, outputs: Outputs) -> None:
        self._span_of_ours(f"complete {step.number}", now, outputs=len(outputs.tokens) + len(outputs.next_tokens))
        if result.times is None:
            began = max(step.sent_at, self._worker_free_at)
            if result.total_s > 0:
                began = max(began, now - result.total_s)
            took = now - began
        else:
            began, took = result.times.began, sum(result.times.step.values())
        self._worker_free_at = now
        self._trace.span(
            WORKERS,
            f"step {step.number}",
            began,
            took,
            {
                "decode_rows": len(step.decode),
                "prefill_rows": len(step.chunks),
                "tokens": step.work.tokens,
                "context": step.work.context,
                "forward_ms": round(result.forward_s * 1e3, 3),
                "rank_ms": round(result.total_s * 1e3, 3),
                "estimate_ms": round(step.estimate_s * 1e3, 3),
            },
        )
        if result.times is not None:
            self._parts(result.times)
            self._means["steps with prompts" if step.chunks else "decode steps"].add(result.times)

    def _span_of_ours(self, name: str, now: float, **args: int) -> None:
        self._trace.span(SCHEDULER, name, now, self._clock() - now, args)

    def close(self) -> None:
        """Ends the file with the mean of each part, and logs them."""
        for kind, mean in self._means.items():
            if mean.steps:
                name, milliseconds = f"mean of {mean.steps} {kind}, ms", mean.milliseconds()
                self._trace.event("i", WORKERS, self._clock(), name=name, args=milliseconds)
                log.info("profile: %s: %s", name, ", ".join(f"{part} {ms}" for part, ms in milliseconds.items()))
        self._trace.event("i", SCHEDULER, self._clock(), name="end")
        self._trace.close()

    # ------------------------------------------------------------------------------------------------------- helpers

    def _parts(self, times: StepTimes) -> None:
        """Between the steps, up to the beginning of this one, and within it."""
        self._row(times.began - sum(times.between.values()), times.between)
        self._row(times.began, times.step)

    def _row(self, began: float, parts: Mapping[str, float]) -> None:
        for part, seconds in parts.items():
            if part != OTHER:
                self._trace.span(WORKERS, part, began, seconds, {})
            began += seconds

    def _outputs(self, outputs: Outputs, now: float) -> None:
        for opened in outputs.opens:
            self._phase("e", opened.uid, "waiting and prefill", now)
            self._phase("b", opened.uid, "decode", now)
        for output in outputs.tokens:
            if output.finish is not None:
                args: dict[str, Any] = {"finish": output.finish.reason}
                if output.usage is not None:
                    args |= msgspec.structs.asdict(output.usage)
                self._phase("e", output.uid, "decode", now)
                self._phase("e", output.uid, "request", now, args)
                self._live.discard(output.uid)

    def _phase(self, kind: str, uid: int, name: str, now: float, args: dict[str, Any] | None = None) -> None:
        self._trace.event(kind, REQUESTS, now, name=name, cat="request", id=uid, args=args or {})


class _Mean:
    """The mean of each part over some steps."""

    def __init__(self) -> None:
        self.steps = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, times: StepTimes) -> None:
        self.steps += 1
        self._seconds["whole step"] += sum(times.step.values())
        for part, seconds in times.step.items():
            self._seconds[part] += seconds
        for part, seconds in times.between.items():
            if part != OTHER:
                self._seconds[part] += seconds

    def milliseconds(self) -> dict[str, float]:
        return {part: round(seconds / self.steps * 1e3, 3) for part, seconds in self._seconds.items()}
