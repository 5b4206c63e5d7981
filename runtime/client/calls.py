"""Calls under way, for both clients: what comes of a plan's requests, and of one whose chunks are handed out.

They know nothing of waiting: `Client` and `AsyncClient` give them functions that wake whoever waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.outputs import Collector, OutputChunk, chunk_from_message
from vibe_sgl_lite.runtime.client.requests import ClientRequest, Plan
from vibe_sgl_lite.runtime.errors import EngineDeadError, UserError
from vibe_sgl_lite.runtime.messages import Chunk
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling


class Call:
    """One `generate` or `chat` with all its requests: submit, then `finish(position)` for each position that `ended`
    is told, until `running` is False. Events are collected in the connection's thread, so that the caller wakes once a
    request and not once a token.

    ended: called in the connection's thread; must neither block nor raise.
    """

    def __init__(self, connection: Connection, plan: Plan, ended: Callable[[int], None]) -> None:
        self._connection = connection
        self._plan = plan
        self._collectors = [Collector(request.rid, request.n) for request in plan.requests]
        self._outputs: dict[int, Any] = {}  # by position, put together while others still run
        self._open = set(range(len(plan.requests)))
        self._ended = ended

    @property
    def running(self) -> bool:
        return bool(self._open)

    def start(self) -> None:
        """Raises ClosedError."""
        for position, (request, collector) in enumerate(zip(self._plan.requests, self._collectors, strict=True)):
            deliver = partial(self._deliver, position, collector)
            self._connection.submit(request, deliver, patient=self._plan.many)

    def finish(self, position: int) -> None:
        """Note the end of a request. Raises RequestError when it was invalid."""
        self._open.remove(position)
        if self._plan.progress is not None:
            self._plan.progress(len(self._collectors) - len(self._open), len(self._collectors))
        collector = self._collectors[position]
        if isinstance(collector.error, UserError):
            raise collector.error
        if self._plan.outcome is Collector.result:
            self._outputs[position] = collector.result()

    def abandon(self) -> None:
        """Have the engine end what still runs."""
        for position in self._open:
            self._connection.drop(self._plan.requests[position].rid)

    def result(self) -> Any:
        """The outcome, as a rule an Output, or a list of them in order; a request with n > 1 gives a list of its
        samples in place of one.

        Raises the error of a single request, and EngineDeadError when every request of a list ended with it.
        """
        errors = [collector.error for collector in self._collectors]
        if errors and (not self._plan.many or all(isinstance(error, EngineDeadError) for error in errors)):
            for collector in self._collectors:
                if collector.error is not None:
                    raise collector.failure()
        outputs = [
            self._outputs[position] if position in self._outputs else self._plan.outcome(collector)
            for position, collector in enumerate(self._collectors)
        ]
        return outputs if self._plan.many else outputs[0]

    def _deliver(self, position: int, collector: Collector, event: Event) -> None:
        collector.add(event)
        if collector.done:
            self._ended(position)


class StreamState:
    """One request whose chunks are handed out as they come. `sampling`: what it runs with, from the first chunk on.

    client: kept alive as long as the stream. put: takes the events, in the connection's thread.
    """

    def __init__(
        self, client: object, connection: Connection, request: ClientRequest, put: Callable[[Event], None]
    ) -> None:
        self.rid = request.rid
        self._client = client
        self._connection = connection
        self._collector = Collector(request.rid, request.n)
        self._ended = False
        connection.submit(request, put)

    @property
    def sampling(self) -> ResolvedSampling | None:
        return self._collector.sampling

    def _take(self, event: Event) -> OutputChunk | None:
        """The event as a chunk, if it is one. Raises what ended the request."""
        self._collector.add(event)
        self._ended = self._collector.done
        if self._collector.error is not None:
            raise self._collector.failure()
        return chunk_from_message(event) if isinstance(event, Chunk) else None

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.drop(self.rid)

    def __del__(self) -> None:
        if hasattr(self, "_ended"):  # false when the constructor failed
            self._close()
