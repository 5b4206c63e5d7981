"""Keys: files of them, and who gets through to a socket that asks for them."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.transport.curve import AllowList, ClientKeys, client_keys, make_keys, read_keys, read_public

Context = zmq.Context[zmq.Socket[bytes]]


def test_a_pair_is_made_once(tmp_path: Path) -> None:
    public = make_keys(tmp_path / "k")
    assert read_public(public, "f") == read_public(str(tmp_path / "k.pub"), "f") == public.encode()
    keys = read_keys(str(tmp_path / "k"), "f")
    assert keys.public == public.encode()
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert keys.secret.decode() not in (tmp_path / "k.pub").read_text()
    with pytest.raises(ConfigError, match="no key can be written"):
        make_keys(tmp_path / "k")
    (tmp_path / "l").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no key can be written"):
        make_keys(tmp_path / "l")


def test_many_pairs_can_be_read_back(tmp_path: Path) -> None:
    """Keys may begin with any of their 85 characters."""
    for number in range(100):
        public = make_keys(tmp_path / str(number))
        assert read_keys(str(tmp_path / str(number)), "f").public == public.encode()
        assert read_public(str(tmp_path / f"{number}.pub"), "f") == public.encode()


@pytest.mark.parametrize("text", ["", "public x\n", "x" * 40, "\udce9", "public {0}\nsecret {0}\n", "{1}", "é"])
def test_bad_key_files(tmp_path: Path, text: str) -> None:
    public = make_keys(tmp_path / "k")
    secret = read_keys(str(tmp_path / "k"), "f").secret.decode()
    (tmp_path / "bad").write_bytes(text.format(public, secret).encode(errors="surrogateescape"))
    for path in (tmp_path / "bad", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="f: "):
            read_keys(str(path), "f")


def test_arguments_of_clients(tmp_path: Path) -> None:
    public, file = make_keys(tmp_path / "k"), str(tmp_path / "k")
    assert client_keys("tcp://127.0.0.1:1", None, None) is None
    assert client_keys("tcp://127.0.0.1:1", public, file) is not None
    for arguments in (("ipc:///x", public, file), ("tcp://h:1", public, None), ("tcp://h:1", None, file)):
        with pytest.raises(ConfigError, match="go together"):
            client_keys(*arguments)
    with pytest.raises(ConfigError, match="neither a public key"):
        client_keys("tcp://h:1", str(tmp_path / "k"), file)


class Server:
    """A ROUTER with an open ipc address and a guarded tcp one, and an allow-list with one client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context: Context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.server = make_keys(folder / "server")
        self.list = folder / "clients"
        self.list.write_text(f"# who may come\n\n{make_keys(folder / 'known')} a laptop\n")
        self.allowed = AllowList(self.context, str(self.list))
        self.socket.bind(f"ipc://{folder}/s")
        self.allowed.serve(self.socket, read_keys(str(folder / "server"), "f"))
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._clients: list[zmq.Socket[bytes]] = []

    def keys(self, name: str, server: str | None = None) -> ClientKeys:
        return ClientKeys((server or self.server).encode(), read_keys(str(self.folder / name), "f"))

    def client(self, keys: ClientKeys | None, address: str | None = None) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            keys.use(socket)
        socket.connect(address or self.address)
        socket.send(b"hello")
        self._clients.append(socket)
        return socket

    def answered(self, client: zmq.Socket[bytes], within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            self.allowed.answer()
            if self.socket.poll(10):
                self.socket.send_multipart(self.socket.recv_multipart())
            if client.poll(10):
                client.recv()
                return True
        return False

    def close(self) -> None:
        for socket in (*self._clients, self.socket):
            socket.close(linger=0)
        self.allowed.close()
        self.context.term()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def test_who_gets_through(server: Server) -> None:
    known = server.client(server.keys("known"))
    assert server.answered(known, 30)
    make_keys(server.folder / "stranger")
    make_keys(server.folder / "other server")
    wrong_server = (server.folder / "other server.pub").read_text().strip()
    strangers = [
        server.client(server.keys("stranger")),
        server.client(None),
        server.client(server.keys("known", wrong_server)),
    ]
    for stranger in strangers:
        assert not server.answered(stranger, 0.3)
    assert server.allowed.refused_total >= 1
    known.send(b"again")  # it is still served
    assert server.answered(known, 30)
    assert server.answered(server.client(None, f"ipc://{server.folder}/s"), 30)  # bound before the guard was set


def test_a_changed_list_counts_at_once(server: Server) -> None:
    second = make_keys(server.folder / "second")
    assert not server.answered(server.client(server.keys("second")), 0.3)
    server.list.write_text(f"{second}\n")
    assert server.answered(server.client(server.keys("second")), 30)
    assert not server.answered(server.client(server.keys("known")), 0.3)
    server.list.write_text("no key\n")
    assert not server.answered(server.client(server.keys("second")), 0.3)
    os.unlink(server.list)
    assert not server.answered(server.client(server.keys("second")), 0.3)


def test_without_a_handler_nobody_gets_through(server: Server) -> None:
    server.allowed.socket.close()
    client = server.client(server.keys("known"))
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert not server.socket.poll(10)
    assert not client.poll(0)


@pytest.mark.parametrize("text", ["short", "x" * 39, "!!"])
def test_a_list_that_makes_no_sense_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    context: Context = zmq.Context()
    for content in (text, None):
        path = tmp_path / "list"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match="--client-keys"):
            AllowList(context, str(path))
    context.term()
