"""Many connections at once: clients that vanish, clients that are idle, and one that does not read."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import psutil

from tests.http_server.server import Server
from tests.integration.daemon import wait_until
from vibe_sgl_lite.runtime.settings.machine import raise_descriptor_limit

QUICK = {"prompt": "Once", "max_tokens": 5, "temperature": 0}


async def _stream(server: Server, body: dict[str, Any], leave_after: int | None) -> bytes:
    """One streaming request on a connection of its own; the client vanishes after so many bytes."""
    reader, writer = await asyncio.open_connection(*server.address)
    data = json.dumps({"stream": True} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + data)
    try:
        if leave_after is None:
            return await reader.read()
        await reader.readexactly(leave_after)
        transport: Any = writer.transport
        transport.abort()
        return b""
    finally:
        writer.close()


def http_process(server: Server) -> psutil.Process:
    return server.daemon.children()["http_server"]


def test_three_hundred_streams_of_which_a_third_vanishes(server: Server) -> None:
    server.wait_idle()
    process = http_process(server)
    wait_until(lambda: server.get("/server_info").json["http"]["calls"] == 0, 60, "nothing in flight")
    fds, tasks = process.num_fds(), server.get("/server_info").json["http"]["tasks"]

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(
            *(
                _stream(
                    server,
                    {"prompt": f"{i} and", "max_tokens": 5000 if i % 3 == 0 else 12, "ignore_eos": True},
                    [10, 300, 900][i // 3 % 3] if i % 3 == 0 else None,
                )
                for i in range(300)
            )
        )

    answers = asyncio.run(all_of_them())
    whole = [answer for answer in answers if answer]
    assert len(whole) == 200
    assert all(b"200 OK" in answer and b"data: [DONE]" in answer for answer in whole)
    assert all(answer.count(b'"finish_reason":"length"') == 1 for answer in whole)
    stats = server.wait_idle(20)
    assert stats["kv_pages_free"] + stats["kv_pages_cached"] == stats["kv_pages_total"]
    assert stats["kv_pages_evictable"] == stats["kv_pages_cached"]
    wait_until(lambda: process.num_fds() <= fds + 1, 60, "descriptors are closed")
    state = server.get("/server_info").json["http"]
    assert state["calls"] == 0
    assert state["tasks"] <= tasks + 1


def test_a_thousand_idle_connections_and_slow_readers_harm_nobody(server: Server) -> None:
    raise_descriptor_limit()
    alone = [server.post("/v1/completions", QUICK).json["choices"][0]["text"] for _ in range(2)]
    idle = [socket.create_connection(server.address) for _ in range(1000)]
    body = {"prompt": "x", "n": 8, "max_tokens": 3000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    slow = [_never_read(server, body) for _ in range(3)]
    wait_until(lambda: server.get("/server_info").json["http"]["calls"] == 3, 60, "the slow readers' calls")
    wait_until(lambda: http_process(server).num_fds() > 1000, 60, "the idle ones are connected")
    beside = [server.post("/v1/completions", QUICK).json["choices"][0]["text"] for _ in range(2)]
    assert beside == alone
    assert server.get("/server_info").json["http"]["calls"] == 3  # they are still served
    for connection in [*slow, *idle]:
        connection.close()
    server.wait_idle(60)
    wait_until(lambda: http_process(server).num_fds() < 100, 60, "descriptors are closed")


def _never_read(server: Server, body: dict[str, Any]) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.address)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection
