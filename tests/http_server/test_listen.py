"""How HTTP workers share one listening socket, whoever of them dies, stops or is busy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vibe_sgl_lite.http_server import listen
from vibe_sgl_lite.http_server.listen import Handover
from vibe_sgl_lite.runtime.errors import ConfigError

HOST = "127.0.0.1"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="http-", dir="/tmp") as path:  # short enough for sockets
        yield Path(path)


def port_of(listener: socket.socket) -> int:
    with listener:
        return int(listener.getsockname()[1])


def test_a_port_in_use_names_who_has_it() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} on {HOST}: process {os.getpid()} listens there; choose"):
            listen.listen(HOST, port)


async def offered(folder: Path, worker: int) -> int:
    """The port that this worker gets of others."""
    return port_of(await asyncio.to_thread(Handover(folder, worker, 3).get, HOST, 0))


def test_the_first_opens_a_port_and_the_others_get_it(folder: Path) -> None:
    async def run() -> None:
        first = Handover(folder, 0, 3)
        listener = first.get(HOST, 0)
        task = first.offer(listener)
        port = int(listener.getsockname()[1])
        assert [await offered(folder, worker) for worker in (1, 2)] == [port, port]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        listener.close()
        assert port_of(Handover(folder, 0, 3).get(HOST, 0)) == port  # nobody has it any more

    asyncio.run(run())


def test_who_asks_and_leaves_at_once_ends_nothing(folder: Path) -> None:
    async def run() -> None:
        with Handover(folder, 0, 3).get(HOST, 0) as listener:
            task = Handover(folder, 0, 3).offer(listener)
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(folder / "http.0"))
            assert await offered(folder, 1) == listener.getsockname()[1]
            assert not task.done()
            task.cancel()

    asyncio.run(run())


def test_the_first_waits_for_one_that_is_busy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is that one's: it cannot be opened again."""
    monkeypatch.setattr(listen, "TAKE_S", 0.05)

    def hand_over_late() -> None:
        time.sleep(0.5)
        with server:
            for _ in range(20):  # those before have left again
                peer, _ = server.accept()
                with peer, contextlib.suppress(OSError):
                    socket.send_fds(peer, [b"l"], [listener.fileno()])
                    if peer.recv(1) == b"":
                        return

    with Handover(folder, 0, 3).get(HOST, 0) as listener, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "http.1"))
        server.listen(16)
        late = threading.Thread(target=hand_over_late)
        late.start()
        assert port_of(Handover(folder, 0, 3).get(HOST, 0)) == listener.getsockname()[1]
        late.join(10)
