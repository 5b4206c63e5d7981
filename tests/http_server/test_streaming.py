"""One stream against a reader of any speed: what waits leaves in one write, and a reader that takes nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

from vibe_sgl_lite.http_server.engine import KEEP_ALIVE_S, SLOW_READER_S, Call, Engine
from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.exchange import DisconnectedError, Exchange
from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.http_server.service import Progress
from vibe_sgl_lite.http_server.streaming import Collected, stream
from vibe_sgl_lite.http_server.timing import CallTimes
from vibe_sgl_lite.runtime.client.requests import plan_generate
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, Finish, Usage, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve

TOKENS = 6
SAMPLING = resolve(
    SamplingParams(max_new_tokens=TOKENS),
    model_defaults={},
    end_token_ids=(),
    prompt_tokens=1,
    context_length=100,
    vocab_size=10,
)


class Reader:
    """In place of a connection: `write` returns when there is room."""

    def __init__(self, receive: asyncio.Event, room: asyncio.Event) -> None:
        async def receiving() -> dict[str, Any]:
            await receive.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                self.writes.append(message["body"])
                await room.wait()

        self.writes: list[bytes] = []
        scope = {"method": "POST", "path": "/", "headers": [], "query_string": b""}
        self.exchange = Exchange(scope, receiving, send, 1)


class NoEngine:
    def __init__(self) -> None:
        self.dropped: list[Call] = []

    def drop(self, call: Call) -> None:
        self.dropped.append(call)


class Plain:
    """Texts alone, between < and >."""

    def whole(self, samples: list[Collected]) -> object:
        return [sample.text for sample in samples]

    def opening(self) -> bytes:
        return b"<"

    def events(self, index: int, chunk: Chunk) -> bytes:
        return chunk.text.encode()

    def closing(self) -> bytes:
        return b">"

    def failure(self, error: ApiError) -> bytes:
        return error.message.encode()


def chunk(rid: str, number: int) -> Chunk:
    last = number == TOKENS - 1
    finish, usage = (Finish("length"), Usage(1, TOKENS)) if last else (None, None)
    return Chunk(rid, 0, number, pack_ids([number]), str(number), finish, usage)


@contextlib.asynccontextmanager
async def streaming(room: asyncio.Event) -> AsyncIterator[tuple[Call, Reader, NoEngine, asyncio.Task[None]]]:
    """A stream that has begun, with its first token."""
    engine, reader = NoEngine(), Reader(asyncio.Event(), room)
    request = plan_generate("x", None, input_ids=None, rid="r", options={}).requests[0]
    call = Call(cast(Engine, engine), [request], CallTimes(Metrics(), asyncio.get_running_loop().time(), "r"))
    task = asyncio.create_task(stream(reader.exchange, call, Plain()))
    call.add(0, Accepted("r", 1, SAMPLING), 0.0)
    call.add(0, chunk("r", 0), 0.0)
    while not reader.writes:
        await asyncio.sleep(0)
    yield call, reader, engine, task


async def fast() -> list[bytes]:
    room = asyncio.Event()
    room.set()
    async with streaming(room) as (call, reader, _, task):
        for number in range(1, TOKENS):
            call.add(0, chunk("r", number), 0.0)
            while len(reader.writes) <= number:
                await asyncio.sleep(0)
        await task
        return reader.writes


async def slow() -> list[bytes]:
    room = asyncio.Event()
    async with streaming(room) as (call, reader, engine, task):
        for number in range(1, TOKENS):
            call.add(0, chunk("r", number), 0.0)
            await asyncio.sleep(0)
        room.set()
        await task
        assert engine.dropped == [call]
        return reader.writes


def test_what_a_slow_reader_has_not_taken_leaves_in_one_write() -> None:
    assert asyncio.run(fast()) == [b"<0", b"1", b"2", b"3", b"4", b"5>"]
    assert asyncio.run(slow()) == [b"<0", b"12345>"]


def test_a_reader_that_takes_nothing_is_given_up() -> None:
    async def run() -> None:
        async with streaming(asyncio.Event()) as (call, _, engine, task):
            now = asyncio.get_running_loop().time()
            call.tick(now + SLOW_READER_S / 2)
            await asyncio.sleep(0)
            assert not task.done()
            call.tick(now + SLOW_READER_S * 2)
            with contextlib.suppress(DisconnectedError):
                await task
            assert isinstance(task.exception(), DisconnectedError)
            assert engine.dropped == [call]

    asyncio.run(run())


def test_a_silent_stream_carries_a_comment() -> None:
    async def run() -> list[bytes]:
        room = asyncio.Event()
        room.set()
        async with streaming(room) as (call, reader, _, task):
            now = asyncio.get_running_loop().time()
            for later, writes in ((KEEP_ALIVE_S / 2, 1), (KEEP_ALIVE_S * 2, 2)):
                call.tick(now + later)
                for _ in range(10):
                    await asyncio.sleep(0)
                assert len(reader.writes) == writes
            for number in range(1, TOKENS):
                call.add(0, chunk("r", number), 0.0)
            await task
            return reader.writes

    assert asyncio.run(run()) == [b"<0", b": keep-alive\n\n", b"12345>"]


def test_no_progress_is_told_after_a_while() -> None:
    progress = Progress()
    assert progress.stuck_for(5, True, 10.0) == 0
    assert progress.stuck_for(5, True, 13.0) == 3
    assert progress.stuck_for(6, True, 14.0) == 0
    assert progress.stuck_for(6, False, 20.0) == 0  # idle
    assert progress.stuck_for(6, True, 21.0) == 1
