"""The listening socket. Several workers share one: the first opens it, the others get it through a private path."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

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


class Handover:
    """How the workers of one engine come to one socket, and a restarted one back to it.

    Each offers the socket that it has under a path of its own in the run directory; who starts takes it from whoever
    has it, and only the first worker opens one when nobody does: on the port of the one before it, if there was one.
    """

    def __init__(self, folder: Path, worker: int, workers: int) -> None:
        self._own = folder / f"http.{worker}"
        self._others = [folder / f"http.{other}" for other in range(workers) if other != worker]
        self._port = folder / "http.port"
        self._opens = worker == 0

    def get(self, host: str, port: int) -> socket.socket:
        """Raises ConfigError, and TimeoutError when the first worker opens none."""
        deadline = time.monotonic() + HANDOVER_S
        while True:
            for path in self._others:
                listener = _take(path)
                if listener is not None:
                    return listener
            if self._opens:
                listener = listen(host, int(self._port.read_text()) if self._port.exists() else port)
                self._port.write_text(str(listener.getsockname()[1]))
                return listener
            if time.monotonic() > deadline:
                raise TimeoutError(f"the first HTTP worker has not opened its port within {HANDOVER_S:.0f} s")
            time.sleep(0.02)

    def offer(self, listener: socket.socket) -> asyncio.Task[None]:
        """Hand the socket to every worker that asks, for as long as this process lives."""
        self._own.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(self._own))
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


def _take(path: Path) -> socket.socket | None:
    """The socket that is offered at `path`; None where nobody does."""
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(1.0)
            peer.connect(str(path))
            _, fds, _, _ = socket.recv_fds(peer, 1, 1)
    except OSError:
        return None
    if not fds:
        return None
    listener = socket.socket(fileno=fds[0])
    listener.setblocking(False)
    return listener
