"""A timeline in Chrome's trace format, for ui.perfetto.dev or chrome://tracing.

Tracks: the scheduler (its work on each batch), the model workers (one span a step, with rows and tokens), and one
row a request, from its arrival over its first token to its last output. The scheduler sees all of these, so one file
holds them. Times are microseconds of the scheduler's clock.

Format: the JSON array form of the "Trace Event Format"; its closing bracket is optional, so a file of a process that
was killed opens too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import ConfigError
from runtime.messages import AddRequest, ForwardBatch, RequestRejected, StepResult
from scheduler.batch import Step
from scheduler.results import Outputs

FILE_NAME = "scheduler.trace.json"
SCHEDULER, WORKERS, REQUESTS = 1, 2, 3
TRACKS = {SCHEDULER: "scheduler", WORKERS: "model_worker", REQUESTS: "requests"}

_encoder = msgspec.json.Encoder()


class Timeline:
    """A scheduler observer that writes `folder`/scheduler.trace.json. `clock`: the clock that `now` is read from.

    Raises ConfigError when the file cannot be made.
    """

    def __init__(self, folder: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = open(Path(folder) / FILE_NAME, "wb")  # noqa: SIM115 -- open until close()
        except OSError as error:
            raise ConfigError(f"profile={str(folder)!r}: {error.strerror}; name a folder to write to") from error
        self._file.write(b"[\n")
        self._clock = clock
        self._worker_free_at = 0.0
        self._live: set[int] = set()  # uids of samples without an end
        for track, name in TRACKS.items():
            self._event("M", track, name="process_name", args={"name": name})

    def added(self, message: AddRequest, now: float, rejected: RequestRejected | None) -> None:
        tokens = len(message.token_ids) // 4
        if rejected is not None:
            self._event("i", REQUESTS, now, name=f"refused: {rejected.error.code}", args={"rid": message.rid})
            return
        for uid in range(message.uid, message.uid + message.sampling.n):
            self._live.add(uid)
            args = {"rid": message.rid, "prompt_tokens": tokens, "max_new_tokens": message.sampling.max_new_tokens}
            self._phase("b", uid, "request", now, args)
            self._phase("b", uid, "waiting and prefill", now)

    def aborted(self, uid: int, now: float, outputs: Outputs) -> None:
        self._outputs(outputs, now)

    def stop_matched(self, uid: int, now: float) -> None:
        if uid in self._live:
            self._live.remove(uid)
            self._phase("e", uid, "decode", now)
            self._phase("e", uid, "request", now, {"finish": "stop string"})

    def scheduled(self, now: float, batch: ForwardBatch | None, step: Step | None) -> None:
        if step is not None:
            self._span(
                SCHEDULER, f"schedule {step.number}", now, self._clock() - now, {"new": len(batch.new if batch else [])}
            )

    def completed(self, result: StepResult, now: float, step: Step, outputs: Outputs) -> None:
        self._span(SCHEDULER, f"complete {step.number}", now, self._clock() - now, {"outputs": len(outputs.tokens)})
        began = max(step.sent_at, self._worker_free_at)
        if result.total_s > 0:
            began = max(began, now - result.total_s)
        self._worker_free_at = now
        self._span(
            WORKERS,
            f"step {step.number}",
            began,
            now - began,
            {
                "decode_rows": len(step.decode),
                "prefill_rows": len(step.chunks),
                "tokens": step.tokens,
                "context": step.context,
                "forward_ms": round(result.forward_s * 1e3, 3),
                "rank_ms": round(result.total_s * 1e3, 3),
                "estimate_ms": round(step.estimate_s * 1e3, 3),
            },
        )
        self._outputs(outputs, now)

    def flushed(self, freed: int | None) -> None:
        pass

    def close(self) -> None:
        self._event("i", SCHEDULER, self._clock(), name="end")
        self._file.seek(-2, os.SEEK_CUR)
        self._file.write(b"\n]\n")
        self._file.close()

    # ------------------------------------------------------------------------------------------------------- helpers

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

    def _span(self, track: int, name: str, start: float, seconds: float, args: dict[str, Any]) -> None:
        self._event("X", track, start, name=name, dur=round(max(0.0, seconds) * 1e6, 1), args=args)

    def _phase(self, kind: str, uid: int, name: str, now: float, args: dict[str, Any] | None = None) -> None:
        self._event(kind, REQUESTS, now, name=name, cat="request", id=uid, args=args or {})

    def _event(self, kind: str, track: int, now: float = 0.0, **fields: Any) -> None:
        event = {"ph": kind, "pid": track, "tid": 1, "ts": round(now * 1e6, 1), **fields}
        self._file.write(_encoder.encode(event) + b",\n")
