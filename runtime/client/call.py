"""One `generate` or `chat` call with all its requests; the sync and the async client only add the waiting.

Events are collected in the connection's thread, so that the caller wakes once a request and not once a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vibe_sgl_lite.runtime.client.connection import Connection, Event
from vibe_sgl_lite.runtime.client.outputs import Collector
from vibe_sgl_lite.runtime.client.requests import Plan
from vibe_sgl_lite.runtime.errors import EngineDeadError, UserError

# Requests of one call in flight at once: enough to fill any batch, and below the engine's default queue limit.
WINDOW = 1024


class Call:
    """Submit, then call `finish(position)` for each position that `ended` is told, until `running` is False.

    ended: called in the connection's thread; must neither block nor raise.
    """

    def __init__(self, connection: Connection, plan: Plan, ended: Callable[[int], None]) -> None:
        self._connection = connection
        self._plan = plan
        self._ended = ended
        self._collectors = [Collector(request.rid, request.n) for request in plan.requests]
        self._submitted = 0
        self._open: set[int] = set()

    @property
    def running(self) -> bool:
        return bool(self._open)

    def start(self) -> None:
        """Raises ClosedError."""
        while self._submitted < len(self._collectors) and len(self._open) < WINDOW:
            self._submit_next()

    def finish(self, position: int) -> None:
        """Note the end of a request and send the next. Raises RequestError when it was invalid, or ClosedError."""
        self._open.remove(position)
        error = self._collectors[position].error
        if isinstance(error, UserError):
            raise error
        if isinstance(error, EngineDeadError):
            while self._submitted < len(self._collectors):  # what was not sent yet fails with the rest
                self._collectors[self._submitted].add(error)
                self._submitted += 1
        elif self._submitted < len(self._collectors):
            self._submit_next()

    def abandon(self) -> None:
        """Have the engine end what still runs."""
        for position in self._open:
            self._connection.drop(self._plan.requests[position].rid)

    def result(self) -> Any:
        """An Output, or a list of them in order; a request with n > 1 gives a list of its samples in place of one.

        Raises the error of a single request, and EngineDeadError when every request of a list ended with it.
        """
        errors = [collector.error for collector in self._collectors]
        if errors and (not self._plan.many or all(isinstance(error, EngineDeadError) for error in errors)):
            for collector in self._collectors:
                if collector.error is not None:
                    raise collector.failure()
        outputs = [collector.result() for collector in self._collectors]
        return outputs if self._plan.many else outputs[0]

    def _submit_next(self) -> None:
        position = self._submitted
        collector = self._collectors[position]

        def deliver(event: Event) -> None:
            collector.add(event)
            if collector.done:
                self._ended(position)

        request = self._plan.requests[position]
        self._connection.submit(request.rid, request.frame, deliver, request.n)
        self._submitted += 1
        self._open.add(position)
