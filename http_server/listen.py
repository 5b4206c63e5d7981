"""The listening socket. Several workers share one: the first opens it, the others get it through a private path."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from pathlib import Path

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.transport.listeners import who_listens

BACKLOG = 2048
HANDOVER_S = 30.0
TAKE_S = 1.0
RETRY_S = 0.02


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
        why = f"{who_listens(port)} listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(
            f"--port {port} on {host}: {why}; choose another --port (0 picks a free one), or --no-http",
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
        """Raises ConfigError, and TimeoutError when no worker hands it over and this one must not open it."""
        deadline = time.monotonic() + HANDOVER_S
        while True:
            offered = False
            for path in self._others:
                try:
                    return _take(path)
                except (FileNotFoundError, ConnectionRefusedError):
                    pass  # nobody is there
                except OSError:
                    offered = True  # who has it is busy, or stopped; that it has hung is the launcher's to say
            if self._opens and not offered:
                return self._open(host, port)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no other HTTP worker has handed its port over within {HANDOVER_S:.0f} s")
            time.sleep(RETRY_S)

    def _open(self, host: str, port: int) -> socket.socket:
        if self._port.exists():
            return listen(host, int(self._port.read_text()))
        listener = listen(host, port)
        new = self._port.with_suffix(".new")
        new.write_text(str(listener.getsockname()[1]))
        new.replace(self._port)
        return listener

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
                    try:
                        peer, _ = await loop.sock_accept(server)
                        with peer:
                            socket.send_fds(peer, [b"l"], [listener.fileno()])
                    except OSError:  # that one has left again, or no descriptor is free; the next may ask later
                        await asyncio.sleep(RETRY_S)

        return asyncio.get_running_loop().create_task(serve())


def _take(path: Path) -> socket.socket:
    """The socket that is offered at `path`. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(TAKE_S)
        peer.connect(str(path))
        _, fds, _, _ = socket.recv_fds(peer, 1, 1)
    if not fds:
        raise ConnectionError("it was closed before the socket came")
    listener = socket.socket(fileno=fds[0])
    listener.setblocking(False)
    return listener
