"""The listening socket. Several workers share one: the first opens it, the others get it through a private path."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

from vibe_sgl_lite.runtime.errors import ConfigError

BACKLOG = 2048
HANDOVER_S = 30.0


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError when that cannot be, naming the flags."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}", field="host") from error
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {port} on {host}: {error.strerror}; choose another --port (0 picks a free one), or --no-http",
            field="port",
        ) from error
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def url(listener: socket.socket, host: str, *, tls: bool) -> str:
    """Where clients find it: port 0 read back."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{listener.getsockname()[1]}"


def offer(listener: socket.socket, path: str) -> asyncio.Task[None]:
    """Hand the socket to every other worker that connects to `path`, for as long as this process lives."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    server.setblocking(False)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        with server:
            while True:
                peer, _ = await loop.sock_accept(server)
                with peer:
                    socket.send_fds(peer, [b"l"], [listener.fileno()])

    return asyncio.get_running_loop().create_task(serve())


def take(path: str) -> socket.socket:
    """The first worker's socket, waiting for it. Raises TimeoutError."""
    deadline = time.monotonic() + HANDOVER_S
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(path)
                _, fds, _, _ = socket.recv_fds(peer, 1, 1)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the first HTTP worker has not opened its port within {HANDOVER_S:.0f} s") from None
            time.sleep(0.02)
    listener = socket.socket(fileno=fds[0])
    listener.setblocking(False)
    return listener
