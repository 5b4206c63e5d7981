"""Driving one call to its end: as a stream of events, or collected. The same for every API."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec

from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError, from_engine
from vibe_sgl_lite.http_server.exchange import EVENTS, Exchange
from vibe_sgl_lite.http_server.sse import KEEP_ALIVE
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import Chunk, Finish, LogprobEntry, Usage, unpack_ids

ID_BYTES = 4


class Answer(Protocol):
    """What an API says to one call: whole, or in pieces once it is accepted, of each chunk, at the end, of an error."""

    def whole(self, samples: list[Collected]) -> object: ...

    def opening(self) -> bytes: ...

    def events(self, index: int, chunk: Chunk) -> bytes: ...

    def closing(self) -> bytes: ...

    def failure(self, error: ApiError) -> bytes: ...


async def deliver(exchange: Exchange, call: Call, answer: Answer, *, streamed: bool | None) -> None:
    if streamed:
        await stream(exchange, call, answer)
    else:
        await exchange.answer_json(answer.whole(await collect(exchange, call)))


async def stream(exchange: Exchange, call: Call, answer: Answer) -> None:
    """Write a call's events as they come, those of one wake-up at once.

    What fails before the first event is answered with a status of its own: raises VibeError. Later, `failure` is the
    last event. The client's leaving ends the call.
    """
    loop = asyncio.get_running_loop()
    try:
        async with exchange.abandoned_on_disconnect():
            await call.start()
            data = answer.opening()
            await exchange.begin(200, EVENTS)
            while True:
                try:
                    chunks = await call.take()
                except VibeError as error:
                    await exchange.write(data + answer.failure(from_engine(error, exchange.path)), more=False)
                    return
                data += b"".join([answer.events(index, chunk) for index, chunk in chunks]) if chunks else KEEP_ALIVE
                if not call.running:
                    await exchange.write(data + answer.closing(), more=False)
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
        self.pooled = b""
        self.finish = Finish("error")
        self.usage = Usage(0, 0)
        self.versions: list[tuple[int, str]] = []

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.token_ids += unpack_ids(chunk.token_ids)
        self.tool_calls += chunk.tool_calls
        self.logprobs += chunk.logprobs or ()
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.pooled = chunk.pooled or self.pooled
        self.finish = chunk.finish or self.finish
        self.usage = chunk.usage or self.usage
        self.versions += chunk.weight_versions


async def collect(exchange: Exchange, call: Call) -> list[Collected]:
    """Every sample of a call, in order. Raises VibeError. The client's leaving ends the call."""
    count = call.running
    chunks: list[tuple[int, Chunk]] = []
    try:
        async with exchange.abandoned_on_disconnect():
            await call.start()
            while call.running or not chunks:
                chunks += await call.take()
    finally:
        call.close()
    samples = [Collected() for _ in range(count)]
    for index, chunk in chunks:
        samples[index].add(chunk)
    return samples


def last_version(samples: Sequence[Collected]) -> str:
    """Of the weights that made the last tokens of one of them."""
    return next((sample.versions[-1][1] for sample in reversed(samples) if sample.versions), "")


class UsageCounter(msgspec.Struct):
    """Tokens of a stream so far. prompt: of all its requests, each counted once. version: of the weights that made the
    last of them."""

    prompt: int
    completion: int = 0
    cached: int = 0
    version: str = ""

    def add(self, chunk: Chunk) -> None:
        if chunk.weight_versions:
            self.version = chunk.weight_versions[-1][1]
        self.completion += len(chunk.token_ids) // ID_BYTES
        if chunk.usage is not None and chunk.index == 0:
            self.cached += chunk.usage.cached_tokens
