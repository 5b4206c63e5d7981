"""The asyncio client: `Client`'s calls, awaited. Works under any event loop: the socket work is in a thread."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec

from vibe_sgl_lite.runtime.client.calls import Call, StreamState
from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.client.core import Requests, Values, check_rid, connect, update_args, values_of
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.outputs import Embedding, Output, OutputChunk
from vibe_sgl_lite.runtime.client.requests import ClientRequest, Plan
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import ControlArgs, ControlCall, ModelInfo, Welcome

T = TypeVar("T")


class AsyncClient(
    Requests[
        Coroutine[Any, Any, Output],
        Coroutine[Any, Any, list[Output]],
        "AsyncStream",
        Coroutine[Any, Any, Embedding],
        Coroutine[Any, Any, list[Embedding]],
        Coroutine[Any, Any, float],
        Coroutine[Any, Any, list[float]],
    ]
):
    """`Client` for asyncio: the same calls and errors, awaited; streams are iterated with `async for`.

    Nothing is sent before the first call or `async with`, whichever comes first, so it can be made outside of a loop.
    Cancelling the task that awaits `generate` or `chat` aborts its requests; call `stream` and `stream_chat` inside the
    running loop.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str = "default",
        resume: bool = True,
        server_key: str | None = None,
        client_key: str | None = None,
    ) -> None:
        self._connection = connect(address, name, resume=resume, server_key=server_key, client_key=client_key)
        weakref.finalize(self, self._connection.stop).atexit = False  # at exit the connection closes itself

    async def abort(self, rid: str) -> None:
        """As `Client.abort`."""
        self._connection.abort(check_rid(rid))

    async def model(self) -> ModelInfo:
        """As `Client.model`."""
        return (await self._session()).model

    async def stats(self) -> Values:
        """As `Client.stats`."""
        return values_of(await _answer(partial(self._connection.query, "stats")))

    async def health(self) -> Values:
        """As `Client.health`."""
        return values_of(await _answer(partial(self._connection.query, "health")))

    async def flush_cache(self) -> None:
        """As `Client.flush_cache`."""
        values_of(await _answer(partial(self._connection.query, "flush_cache")))

    async def watch(self) -> dict[str, Any]:
        """As `Client.watch`."""
        values = values_of(await _answer(partial(self._connection.query, "watch")))
        return dict(msgspec.json.decode(str(values["snapshot"])))

    async def pause_generation(self, mode: str = "abort") -> None:
        """As `Client.pause_generation`."""
        await self._control("pause", {"mode": mode})

    async def continue_generation(self) -> None:
        """As `Client.continue_generation`."""
        await self._control("continue", {})

    async def update_weights_from_disk(
        self,
        path: str | os.PathLike[str],
        weight_version: str | None = None,
        *,
        flush_cache: bool = True,
        abort_all_requests: bool = False,
    ) -> str:
        """As `Client.update_weights_from_disk`."""
        options = {"flush_cache": flush_cache, "abort_all_requests": abort_all_requests}
        values = await self._control("update_weights", update_args(path, weight_version, options))
        return str(values["weight_version"])

    async def weight_version(self) -> str:
        """As `Client.weight_version`."""
        return str((await self.stats())["weight_version"])

    async def sleep(self, level: int = 1, mode: str = "keep") -> None:
        """As `Client.sleep`."""
        await self._control("sleep", {"level": level, "mode": mode})

    async def wake_up(self) -> None:
        """As `Client.wake_up`."""
        await self._control("wake", {})

    async def _control(self, what: ControlCall, args: ControlArgs) -> Values:
        return values_of(await _answer(partial(self._connection.query, what, args=args)))

    async def close(self) -> None:
        """As `Client.close`."""
        self._connection.stop()
        await asyncio.to_thread(self._connection.close)

    async def __aenter__(self: T) -> T:
        assert isinstance(self, AsyncClient)
        try:
            await self._session()
        except BaseException:
            self._connection.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _session(self) -> Welcome:
        return await _answer(self._connection.open)

    async def _run(self, make: Callable[[], Plan]) -> Any:
        ended: Mailbox[int] = Mailbox()
        call = Call(self._connection, make(), ended.put)
        try:
            call.start()
            while call.running:
                call.finish(await ended.get())
        finally:
            call.abandon()
        return call.result()

    def _stream(self, request: ClientRequest) -> AsyncStream:
        return AsyncStream(self, self._connection, request)


class Mailbox(Generic[T]):
    """Put in by any thread, awaited by one task of the loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            assert self._loop.is_closed()  # then nobody can be waiting

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> T:
        while not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._items.popleft()


async def _answer(ask: Callable[[Callable[[T | VibeError], None]], None]) -> T:
    """Ask, wait for the one answer, and raise it when it is an error."""
    answers: Mailbox[T | VibeError] = Mailbox()
    ask(answers.put)
    answer = await answers.get()
    if isinstance(answer, VibeError):
        raise answer
    return answer


class AsyncStream(StreamState, AsyncIterator[OutputChunk]):
    """The chunks of one request. It is aborted when it is left early: aclose, the end of its `async with`, garbage
    collection, and the cancellation of the task that waits for a chunk or that made it.

    For one task at a time.
    """

    def __init__(self, client: AsyncClient, connection: Connection, request: ClientRequest) -> None:
        self._events: Mailbox[Event] = Mailbox()
        super().__init__(client, connection, request, self._events.put)
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(_close_if_cancelled(self))

    async def __anext__(self) -> OutputChunk:
        while not self._ended:
            try:
                event = await self._events.get()
            except BaseException:
                self._close()
                raise
            chunk = self._take(event)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()


def _close_if_cancelled(stream: AsyncStream) -> Callable[[asyncio.Task[Any]], None]:
    """A cancelled task's traceback may keep its streams alive for long."""
    reference = weakref.ref(stream)

    def done(task: asyncio.Task[Any]) -> None:
        alive = reference()
        if alive is not None and task.cancelled():
            alive._close()

    return done
