"""The asyncio client: `Client`'s calls, awaited. Works under any event loop: the socket work is in a thread."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, Unpack, overload

from vibe_sgl_lite.runtime.client.call import Call
from vibe_sgl_lite.runtime.client.client import Params, Rid, Values
from vibe_sgl_lite.runtime.client.connection import Connection, Event, QueryAnswer
from vibe_sgl_lite.runtime.client.outputs import Collector, Output, OutputChunk, chunk_from_message
from vibe_sgl_lite.runtime.client.requests import (
    ChatOptions,
    GenerateOptions,
    Messages,
    Plan,
    Request,
    plan_chat,
    plan_generate,
    single,
)
from vibe_sgl_lite.runtime.errors import VibeError, error_from_code
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, ModelInfo, Welcome
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams
from vibe_sgl_lite.runtime.transport.rundir import default_address

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same calls and errors, awaited; streams are iterated with `async for`.

    Nothing is sent before the first call or `async with`, whichever comes first, so it can be made outside of a loop.
    """

    def __init__(self, address: str | None = None, *, name: str = "default") -> None:
        self._connection = Connection(default_address(name) if address is None else address)
        weakref.finalize(self, self._connection.stop).atexit = False  # at exit the connection closes itself

    # ------------------------------------------------------------------------------------------------- requests

    @overload
    async def generate(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Output: ...

    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        sampling_params: Params = None,
        *,
        input_ids: None = None,
        rid: Rid = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Output]: ...

    @overload
    async def generate(
        self,
        prompt: None = None,
        sampling_params: Params = None,
        *,
        input_ids: list[list[int]],
        rid: Rid = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Output]: ...

    async def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        *,
        input_ids: Any = None,
        rid: Any = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """As `Client.generate`. Cancelling the awaiting task aborts the requests."""
        return await self._run(plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options))

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        rid: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Output: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Messages],
        sampling_params: Params = None,
        *,
        rid: Rid = None,
        **options: Unpack[ChatOptions],
    ) -> list[Output]: ...

    async def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        rid: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Any:
        """As `Client.chat`. Cancelling the awaiting task aborts the requests."""
        return await self._run(plan_chat(messages, sampling_params, rid=rid, options=options))

    def stream(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """As `Client.stream`; call it inside the running loop. The request is sent at once."""
        plan = plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options)
        return AsyncStream(self, self._connection, single(plan))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        rid: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """As `Client.stream_chat`; call it inside the running loop."""
        plan = plan_chat(messages, sampling_params, rid=rid, options=options)
        return AsyncStream(self, self._connection, single(plan))

    async def abort(self, rid: str) -> None:
        """As `Client.abort`."""
        self._connection.abort(rid)

    # --------------------------------------------------------------------------------------------------- engine

    @property
    def address(self) -> str:
        return self._connection.address

    async def model(self) -> ModelInfo:
        """As `Client.model`."""
        return (await self._session()).model

    async def stats(self) -> Values:
        """As `Client.stats`."""
        return await self._query("stats")

    async def health(self) -> Values:
        """As `Client.health`."""
        return await self._query("health")

    async def flush_cache(self) -> None:
        """As `Client.flush_cache`."""
        await self._query("flush_cache")

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

    # -------------------------------------------------------------------------------------------------- waiting

    async def _run(self, plan: Plan) -> Any:
        ended: Mailbox[int] = Mailbox()
        call = Call(self._connection, plan, ended.put)
        try:
            call.start()
            while call.running:
                call.finish(await ended.get())
        finally:
            call.abandon()
        return call.result()

    async def _session(self) -> Welcome:
        return await _answer(self._connection.open)

    async def _query(self, what: Literal["stats", "health", "flush_cache"]) -> Values:
        def ask(deliver: Callable[[QueryAnswer], None]) -> None:
            self._connection.query(what, deliver)

        reply = await _answer(ask)
        if reply.error is not None:
            raise error_from_code(reply.error.code, reply.error.message, reply.error.field)
        return reply.values


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


class AsyncStream(AsyncIterator[OutputChunk]):
    """The chunks of one request. It is aborted when it is left early: aclose, the end of its `async with`, garbage
    collection, and the cancellation of the task that waits for a chunk or that made it.

    For one task at a time. `sampling` is what the request runs with, from the first chunk on.
    """

    def __init__(self, client: AsyncClient, connection: Connection, request: Request) -> None:
        self.rid = request.rid
        self._client = client  # keeps it open
        self._connection = connection
        self._collector = Collector(request.rid, request.n)
        self._events: Mailbox[Event] = Mailbox()
        self._ended = False
        connection.submit(request.rid, request.frame, self._events.put, request.n)
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(_close_if_cancelled(self))

    @property
    def sampling(self) -> ResolvedSampling | None:
        return self._collector.sampling

    async def __anext__(self) -> OutputChunk:
        while not self._ended:
            try:
                event = await self._events.get()
            except BaseException:
                self._close()
                raise
            self._collector.add(event)
            self._ended = self._collector.done
            if self._collector.error is not None:
                raise self._collector.failure()
            if isinstance(event, Chunk):
                return chunk_from_message(event)
            assert isinstance(event, Accepted)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.drop(self.rid)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):  # false when the constructor failed
            self._close()


def _close_if_cancelled(stream: AsyncStream) -> Callable[[asyncio.Task[Any]], None]:
    """A cancelled task's traceback may keep its streams alive for long."""
    reference = weakref.ref(stream)

    def done(task: asyncio.Task[Any]) -> None:
        alive = reference()
        if alive is not None and task.cancelled():
            alive._close()

    return done
