"""Streams of an HTTP server, read as cheaply as can be: bytes are counted, not parsed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit


class _Stream(asyncio.Protocol):
    """One request on a connection of its own. done: the last bytes, once the server has closed it."""

    def __init__(self, request: bytes) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._request = request
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._last = data

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(self._last)


async def read_streams(url: str, path: str, bodies: Sequence[Mapping[str, Any]]) -> None:
    """All at once, each to its end. Raises RuntimeError for one that ends otherwise than with [DONE]."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    streams = []
    for body in bodies:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        make = partial(_Stream, head.encode() + data)
        streams.append((await loop.create_connection(make, address.hostname or "", address.port or 0))[1])
    for stream in streams:
        if b"[DONE]" not in (last := await stream.done):
            raise RuntimeError(f"a stream ended with {last[-300:]!r}")
