"""The HTTP server's line to the engine: one client session, whose events reach asyncio in batches.

The connection's thread appends what has come to one queue and wakes the event loop once for all of it, however many
requests it belongs to; a handler that waits for a call is woken once and takes everything that has come for it. So a
step's tokens cost one wake-up of the loop, and the chunks of a reader that lags are written together.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from vibe_sgl_lite.http_server.timing import CallTimes
from vibe_sgl_lite.runtime.client.connection import Connection, QueryAnswer
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.requests import ClientRequest
from vibe_sgl_lite.runtime.errors import EngineError, VibeError, error_from_code
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, ControlArgs, Finish, ModelInfo, QueryReply, Welcome, What

READY_POLL_S = 0.05
REFUSAL_S = 0.05  # after it was accepted: the scheduler refuses at once what it has no room for
KEEP_ALIVE_S = 10.0
NAME = "http_server"  # of every worker's session
SLOW_READER_S = 30.0  # a connection that takes nothing for so long is given up

Values = dict[str, int | float | str | bool]


class Engine:
    """For the event loop that it is made in. `ready` after `wait_ready` has seen a scheduler that answers."""

    def __init__(self, address: str) -> None:
        self.ready = False
        self.model: ModelInfo | None = None
        self.calls: set[Call] = set()
        self._loop = asyncio.get_running_loop()
        self._connection = Connection(address, queue=False, name=NAME)
        self._events: deque[tuple[Call, int, Event]] = deque()
        self._wake_due = False
        self._ticker = self._loop.create_task(self._tick())

    async def wait_ready(self) -> None:
        """Until the engine can serve."""
        while not self.ready:
            try:
                await self.query("health")
                welcome = await self._ask(self._connection.open)
                assert isinstance(welcome, Welcome)
                self.model = welcome.model
                self.ready = True
            except VibeError:
                await asyncio.sleep(READY_POLL_S)

    async def query(self, what: What, args: ControlArgs | None = None) -> Values:
        """Raises VibeError."""

        def ask(deliver: Callable[[QueryAnswer], None]) -> None:
            self._connection.query(what, deliver, args)

        reply = await self._ask(ask)
        assert isinstance(reply, QueryReply)
        if reply.error is not None:
            raise error_from_code(reply.error.code, reply.error.message, reply.error.field)
        return reply.values

    def submit(self, requests: Sequence[ClientRequest], times: CallTimes, *, keep_aborted: bool = False) -> Call:
        """Send requests whose outputs make one answer."""
        call = Call(self, requests, times, keep_aborted=keep_aborted)
        for position, request in enumerate(requests):
            self._connection.submit(request, self._receiver(call, position))
        self.calls.add(call)
        return call

    def abort(self, rid: str) -> None:
        """End what was asked for over HTTP, of any worker, under this rid; with "", all of it."""
        self._connection.abort_fellows(rid)

    def drop(self, call: Call) -> None:
        """Its caller has left; what still runs ends."""
        self.calls.discard(call)
        for request in call.requests:
            self._connection.drop(request.rid)

    async def close(self) -> None:
        self._ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ticker
        self._connection.stop()
        await asyncio.to_thread(self._connection.close)

    def _receiver(self, call: Call, position: int) -> Callable[[Event], None]:
        """Called in the connection's thread."""
        events, loop = self._events, self._loop

        def receive(event: Event) -> None:
            events.append((call, position, event))
            if not self._wake_due:
                self._wake_due = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                    loop.call_soon_threadsafe(self._take)

        return receive

    def _take(self) -> None:
        self._wake_due = False  # before the queue is read: what comes later wakes again
        now, events = self._loop.time(), self._events
        while events:
            call, position, event = events.popleft()
            call.add(position, event, now)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = self._loop.time()
            for call in list(self.calls):
                call.tick(now)

    async def _ask(self, ask: Callable[[Callable[[object], None]], None]) -> object:
        """Ask in the connection's thread, wait for the answer, raise it when it is an error."""
        answer: asyncio.Future[object] = self._loop.create_future()

        def settle(value: object) -> None:
            if not answer.done():
                answer.set_result(value)

        def deliver(value: object) -> None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(settle, value)

        ask(deliver)
        value = await answer
        if isinstance(value, VibeError):
            raise value
        return value


class Call:
    """Requests in flight whose samples are numbered through: of requests with n samples each, sample j of i is i n + j.

    For one task: `start`, then `take` until `running` is 0; `close` at the end, which aborts what still runs.
    keep_aborted: what was aborted has ended, with what it has; else the call fails.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[ClientRequest], times: CallTimes, *, keep_aborted: bool = False
    ) -> None:
        self._whole = ("stop", "length", "abort") if keep_aborted else ("stop", "length")
        self.requests = requests
        self.n = requests[0].n
        self.running = len(requests) * self.n
        self.prompt_tokens = [0] * len(requests)
        self.times = times
        self._engine = engine
        self._accepted = 0
        self._chunks: list[tuple[int, Chunk]] = []
        self._error: VibeError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._touched = times.began  # when the reader last got something
        self._sending_since: float | None = None
        self._give_up: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Until every request is accepted and was not refused right after. Raises VibeError, having ended the rest."""
        while self._accepted < len(self.requests) and self._error is None:
            await self._wait()
        if not self._chunks and self._error is None:
            timer = asyncio.get_running_loop().call_later(REFUSAL_S, self._wake)
            await self._wait()
            timer.cancel()
        if self._error is not None and not self._chunks:
            raise self._error

    async def take(self) -> list[tuple[int, Chunk]]:
        """What has come of which sample, waiting for something; nothing after KEEP_ALIVE_S without any.

        Raises VibeError once everything before it was taken: one request's failure fails the call.
        """
        if not self._chunks:
            if self._error is not None:
                raise self._error
            await self._wait()
        chunks, self._chunks = self._chunks, []
        return chunks

    def sending(self, now: float | None, give_up: Callable[[], None]) -> None:
        """A write to the reader begins, or (None) has ended."""
        self._sending_since, self._give_up = now, give_up

    def close(self) -> None:
        self._engine.drop(self)

    def add(self, position: int, event: Event, now: float) -> None:
        match event:
            case Chunk():
                index = position * self.n + event.index
                self.times.on_chunk(index, event, now)
                self._chunks.append((index, event))
                if event.finish is None:
                    pass
                elif event.finish.reason in self._whole:
                    self.running -= 1
                else:
                    self._error = self._error or _failure(event.finish)
            case Accepted():
                self._accepted += 1
                self.prompt_tokens[position] = event.prompt_tokens
            case _:
                self._error = self._error or event
        self._wake()

    def tick(self, now: float) -> None:
        if self._sending_since is not None:
            if now - self._sending_since > SLOW_READER_S:
                self._give_up()
        elif now - self._touched > KEEP_ALIVE_S and self._accepted == len(self.requests):
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        await self._waiter
        self._touched = loop.time()


def _failure(finish: Finish) -> VibeError:
    if finish.error is not None:
        return error_from_code(finish.error.code, finish.error.message, finish.error.field)
    return AbortedError("the request was aborted before its end")


class AbortedError(EngineError):
    """Ended from outside: by `/abort_request`, by a stop of the engine, or because its reader fell behind."""

    code = "aborted"
