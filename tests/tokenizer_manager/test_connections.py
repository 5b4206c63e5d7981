"""Connections beyond the limit are shut down, those within it stay; a place that becomes free is taken."""

from __future__ import annotations

import time
from pathlib import Path

import zmq

from vibe_sgl_lite.tokenizer_manager.connections import ConnectionLimit


def test_a_limit_of_connections(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.ROUTER)
    limit = ConnectionLimit(server, 20)
    address = f"ipc://{tmp_path}/s"
    server.bind(address)
    clients = [context.socket(zmq.DEALER) for _ in range(30)]
    for client in clients:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.IMMEDIATE, 1)  # sends only where there is a connection

    def serve(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            limit.check()
            while server.poll(10):
                server.send_multipart(server.recv_multipart())

    for client in clients[:10]:
        client.connect(address)
    serve(0.3)
    for client in clients[10:]:
        client.connect(address)
    serve(0.5)
    assert limit.refused_total >= 20
    for _ in range(5):
        for client in clients[:10]:
            client.send(b"x", zmq.NOBLOCK)
        serve(0.1)
        assert all(client.poll(0) and client.recv() == b"x" for client in clients[:10])
    for client in clients[:10]:
        client.close()
    serve(0.5)
    assert len(limit._open) == 10
    limit.close()
    for socket in (*clients, server):
        socket.close(linger=0)
    context.term()
