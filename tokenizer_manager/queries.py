"""Questions of clients that only the scheduler can answer, with a time limit for it."""

from __future__ import annotations

import math
from typing import get_args

import msgspec

from vibe_sgl_lite.runtime.errors import EngineError
from vibe_sgl_lite.runtime.messages import ControlCall, ErrorInfo, QueryReply, What, numbers_from_now
from vibe_sgl_lite.tokenizer_manager.sessions import Session

ANSWER_S = 2.0
MAX_PENDING = 1024

Values = dict[str, int | float | str | bool]
CONTROL = frozenset(get_args(ControlCall))  # these wait for running requests, or for files to be read


class Pending(msgspec.Struct, frozen=True):
    """qid: the client's own number. due: monotonic."""

    session: Session
    qid: int
    what: What
    due: float


class Queries:
    """Questions asked and not answered yet, by the number that the scheduler sees."""

    def __init__(self) -> None:
        self._next = numbers_from_now()
        self._pending: dict[int, Pending] = {}

    @property
    def full(self) -> bool:
        return len(self._pending) >= MAX_PENDING

    def ask(self, session: Session, qid: int, what: What, now: float) -> int:
        """The number to ask the scheduler under."""
        number, self._next = self._next, self._next + 1
        self._pending[number] = Pending(session, qid, what, math.inf if what in CONTROL else now + ANSWER_S)
        return number

    def take_control(self) -> list[Pending]:
        """Those without a time limit; takes them out."""
        numbers = [number for number, pending in self._pending.items() if pending.what in CONTROL]
        return [self._pending.pop(number) for number in numbers]

    def answered(self, number: int) -> Pending | None:
        """None for an answer that came too late."""
        return self._pending.pop(number, None)

    def overdue(self, now: float) -> list[Pending]:
        """Takes them out."""
        late = [number for number, pending in self._pending.items() if pending.due <= now]
        return [self._pending.pop(number) for number in late]


def health_values(values: Values, draining: bool) -> Values:
    """What the scheduler answered, as an answer to `health`: while it awaits ranks, requests wait too."""
    serving = "ok" if values.get("ranks_ready", True) else "sleeping" if values.get("sleep_level") else "recovering"
    return values | {"status": "draining" if draining else serving, "draining": draining}


def no_answer(pending: Pending, draining: bool) -> QueryReply:
    """To a question that the scheduler has not answered in time."""
    if pending.what == "health":
        return QueryReply(pending.qid, {"status": "scheduler not answering", "draining": draining})
    error = ErrorInfo(EngineError.code, f"the scheduler did not answer within {ANSWER_S:g} s")
    return QueryReply(pending.qid, {}, error)
