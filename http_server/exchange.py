"""One HTTP request and its answer, over ASGI. Knows nothing of what is asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.timing import CallTimes

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Exchange:
    """status: of the answer, once it has begun; 0 before. extra_headers: added to any answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str = (scope.get("client") or ("?",))[0]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.query: str = scope["query_string"].decode("latin-1")
        self.status = 0
        self.times: CallTimes | None = None  # of what the engine did for it
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._receive, self._send, self._max_body = receive, send, max_body
        self._task: asyncio.Task[Any] | None = None
        self._gone = False

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    async def body(self) -> bytes:
        """All of it. Raises ApiError (413) for too much, as soon as that is known; DisconnectedError."""
        length = self.header(b"content-length")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextlib.asynccontextmanager
    async def abandoned_on_disconnect(self) -> AsyncIterator[None]:
        """Inside, for a body that was read: the client's leaving ends the block with DisconnectedError."""
        self._task = task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.give_up()

        watcher = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if self._gone:
                task.uncancel()
                raise DisconnectedError from None
            raise
        finally:
            self._task = None
            watcher.cancel()

    def give_up(self) -> None:
        """The client is gone, or takes nothing: end what works for it."""
        if self._task is not None and not self._gone:
            self._gone = True
            self._task.cancel()

    async def begin(self, status: int, content_type: bytes, length: int | None = None) -> None:
        self.status = status
        headers = [(b"content-type", content_type), *self.extra_headers]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if content_type is EVENTS:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, data: bytes, status: int = 200, content_type: bytes = JSON) -> None:
        await self.begin(status, content_type, len(data))
        await self.write(data, more=False)

    async def answer_json(self, value: object, status: int = 200) -> None:
        await self.answer(msgspec.json.encode(value), status)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body has more than {self._max_body} bytes: send less", code="too_large")


class DisconnectedError(Exception):
    """The client is gone: nobody waits for an answer."""
