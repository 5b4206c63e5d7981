"""Driving one call to its end: as a stream of events, or collected. The same for every API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError, from_engine
from vibe_sgl_lite.http_server.exchange import EVENTS, Exchange
from vibe_sgl_lite.http_server.sse import KEEP_ALIVE
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import Chunk, Finish, LogprobEntry, Usage, unpack_ids

ID_BYTES = 4


async def stream(
    exchange: Exchange,
    call: Call,
    *,
    opening: Callable[[], bytes],
    events: Callable[[int, Chunk], bytes],
    closing: Callable[[], bytes],
    failure: Callable[[ApiError], bytes],
) -> None:
    """Write a call's events as they come, those of one wake-up at once.

    What fails before the first event is answered with a status of its own: raises VibeError. Later, `failure` is the
    last event. The client's leaving ends the call.
    """
    loop = asyncio.get_running_loop()
    try:
        async with exchange.abandoned_on_disconnect():
            await call.start()
            data = opening()
            await exchange.begin(200, EVENTS)
            while True:
                try:
                    chunks = await call.take()
                except VibeError as error:
                    await exchange.write(data + failure(from_engine(error, exchange.path)), more=False)
                    return
                data += b"".join([events(index, chunk) for index, chunk in chunks]) if chunks else KEEP_ALIVE
                if not call.running:
                    await exchange.write(data + closing(), more=False)
                    return
                if data:
                    call.sending(loop.time(), exchange.give_up)
                    await exchange.write(data)
                    call.sending(None, exchange.give_up)
                    data = b""
    finally:
        call.close()


class Collected:
    """Everything of one sample."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobEntry] = []
        self.prompt_logprobs: Sequence[LogprobEntry | None] = ()
        self.finish = Finish("error")
        self.usage = Usage(0, 0)


async def collect(exchange: Exchange, call: Call) -> list[Collected]:
    """Every sample of a call, in order. Raises VibeError. The client's leaving ends the call."""
    samples = [Collected() for _ in range(call.running)]
    chunks: list[tuple[int, Chunk]] = []
    try:
        async with exchange.abandoned_on_disconnect():
            await call.start()
            while call.running or not chunks:
                chunks += await call.take()
    finally:
        call.close()
    for sample, parts in zip(samples, _by_sample(chunks, len(samples)), strict=True):
        sample.chunks = parts
        sample.text = "".join([part.text for part in parts])
        sample.reasoning = "".join([part.reasoning for part in parts])
        sample.token_ids = unpack_ids(b"".join([part.token_ids for part in parts]))
        for part in parts:
            sample.tool_calls += part.tool_calls
            sample.logprobs += part.logprobs or ()
            sample.prompt_logprobs = part.prompt_logprobs or sample.prompt_logprobs
        last = parts[-1]
        assert last.finish is not None
        sample.finish, sample.usage = last.finish, last.usage or Usage(0, len(sample.token_ids))
    return samples


def _by_sample(chunks: Sequence[tuple[int, Chunk]], count: int) -> list[list[Chunk]]:
    parts: list[list[Chunk]] = [[] for _ in range(count)]
    for index, chunk in chunks:
        parts[index].append(chunk)
    return parts


class UsageCounter(msgspec.Struct):
    """Tokens of a stream so far. prompt: of all its requests, each counted once."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def add(self, chunk: Chunk) -> None:
        self.completion += len(chunk.token_ids) // ID_BYTES
        if chunk.usage is not None and chunk.index == 0:
            self.cached += chunk.usage.cached_tokens
