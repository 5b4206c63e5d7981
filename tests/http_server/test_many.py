"""Many connections at once: clients that vanish, clients that are idle, and one that does not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import psutil

from tests.http_server.server import Server
from tests.integration.daemon import wait_until


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


def test_idle_connections_and_a_slow_reader_harm_nobody(server: Server) -> None:
    idle = [socket.create_connection(server.address) for _ in range(500)]
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(server.address)
    body = {"prompt": "x", "n": 8, "max_tokens": 3000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    data = json.dumps(body).encode()
    slow.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data) + data
    )
    wait_until(lambda: server.get("/server_info").json["http"]["calls"] == 1, 60, "the slow reader's call")
    began = time.monotonic()
    for _ in range(5):
        assert server.post("/v1/completions", {"prompt": "Once", "max_tokens": 5}).status == 200
    assert time.monotonic() - began < 10
    assert server.get("/server_info").json["http"]["calls"] == 1  # it is still served
    slow.close()
    for connection in idle:
        connection.close()
    server.wait_idle(20)
    wait_until(lambda: http_process(server).num_fds() < 100, 60, "descriptors are closed")
