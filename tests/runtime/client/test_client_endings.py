"""The sync client leaves, or its engine dies: every request ends, and no thread stays."""

from __future__ import annotations

import errno
import gc
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from tests.runtime.client.fake_engine import STOP, FakeEngine, accepted, answer, chunk, fake_engine, silent
from vibe_sgl_lite import Client
from vibe_sgl_lite.runtime.client import connection
from vibe_sgl_lite.runtime.client.socket_thread import ClientSocket
from vibe_sgl_lite.runtime.errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    EngineDeadError,
    EngineError,
    ProtocolError,
)
from vibe_sgl_lite.runtime.messages import Abort, ErrorInfo, Generate, Goodbye, Hello, Refused, ServerMessage


def test_break_aborts(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "x")]
    for piece in client.stream("a", rid="broken"):
        assert piece.text == "x"
        break
    with client.stream("a", rid="left") as stream:
        next(stream)
    stream = client.stream("a", rid="collected")
    del stream
    gc.collect()
    engine.wait_for(Abort, 3)
    assert engine.aborted() == ["broken", "left", "collected"]


def test_a_finished_stream_sends_no_abort(client: Client, engine: FakeEngine) -> None:
    list(client.stream("ab"))
    client.stats()
    assert engine.aborted() == []


def test_close_says_goodbye_and_wakes_who_waits(engine: FakeEngine) -> None:
    engine.script = silent
    client = Client(engine.address)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "x")
        engine.wait_for(Generate)
        client.close()
        with pytest.raises(ClosedError, match="closed during the call"):
            future.result(30)
    engine.wait_for(Goodbye)
    client.close()
    for call in (lambda: client.generate("x"), client.stats, lambda: client.stream("x"), lambda: client.abort("x")):
        with pytest.raises(ClosedError):
            call()


def test_a_forgotten_client_says_goodbye(engine: FakeEngine) -> None:
    client = Client(engine.address)
    stream = client.stream("abc")
    del client
    gc.collect()
    assert [c.text for c in stream] == ["c", "b", "a"]  # the stream keeps it open
    del stream
    gc.collect()
    engine.wait_for(Goodbye)


def test_no_thread_is_left(engine: FakeEngine) -> None:
    before = threading.active_count()
    for _ in range(5):
        with Client(engine.address) as client:
            client.generate("a")
    assert threading.active_count() == before


def test_exit_of_the_interpreter_says_goodbye(engine: FakeEngine) -> None:
    engine.script = silent
    code = f"from vibe_sgl_lite import Client; c = Client({engine.address!r}); s = c.stream('x')"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    engine.wait_for(Goodbye)
    assert time.monotonic() - start < 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_socket_that_cannot_be_made_hangs_nothing(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def full(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(zmq.Socket, "get_monitor_socket", full)
    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(Client, engine.address).exception(30), EngineError)
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_daemon(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectError, match=r"no engine answers at ipc://.*python launch\.py") as caught:
        Client(f"ipc://{tmp_path}/api.sock")
    assert isinstance(caught.value, EngineDeadError)
    assert isinstance(caught.value, ConnectionError)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "api.sock"))
    with pytest.raises(ConnectError):
        Client(f"ipc://{tmp_path}/api.sock")
    assert time.monotonic() - start < 10
    with pytest.raises(ConnectError):
        Client("tcp://127.0.0.1:9")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("address", ["", "api.sock", "tcp://127.0.0.1", "http://127.0.0.1:80", "ipc://" + "x" * 200])
def test_an_address_that_makes_no_sense(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        Client(address)


def test_the_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:  # tmp_path may be too long for a socket
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        with pytest.raises(ConnectError, match=f"{folder}/vibe-sgl-lite/default/api.sock"):
            Client()
        with pytest.raises(ConnectError, match=f"{folder}/vibe-sgl-lite/other/api.sock"):
            Client(name="other")


def test_every_request_ends_when_the_engine_dies(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "par")] if r.prompt == "slow" else answer(r)
    stream = client.stream("slow")
    assert next(stream).text == "par"
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(client.generate, "slow") for _ in range(2)]
        both = pool.submit(client.generate, ["ab", "slow"])
        engine.wait_for(Generate, 5)
        time.sleep(0.05)
        start = time.monotonic()
        engine.close()
        for call in calls:
            error = call.exception(30)
            assert isinstance(error, EngineDeadError)
            assert vars(error)["output"].text == "par"
        done, dead = both.result(30)
        with pytest.raises(EngineDeadError, match="connection to the engine was lost"):
            next(stream)
    assert time.monotonic() - start < 10
    assert (done.text, dead.text, dead.finish_reason) == ("ba", "par", "error")
    assert isinstance(dead.error, EngineDeadError)
    assert next(stream, None) is None  # exactly one terminal event
    with pytest.raises(ConnectError):
        client.generate(["a"] * 3000)


def test_all_dead_raises(client: Client, engine: FakeEngine) -> None:
    engine.script = silent
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, ["a"] * 1500)
        engine.wait_for(Generate, 1000)
        engine.close()
        assert isinstance(call.exception(30), EngineDeadError)


def test_the_end_that_came_before_the_death_counts(tmp_path: Path) -> None:
    for _ in range(10):
        with fake_engine(tmp_path, silent) as engine, Client(engine.address) as client:
            stream = client.stream("a", rid="r")
            engine.wait_for(Generate)
            engine.send(chunk("r", 0, "abc", STOP))
            engine.close()
            assert [c.finish_reason for c in stream] == ["stop"]


def test_the_next_call_finds_the_next_engine(tmp_path: Path) -> None:
    with fake_engine(tmp_path) as engine:
        client = Client(engine.address)
    with pytest.raises(EngineDeadError):
        client.stats()
    with fake_engine(tmp_path):
        assert client.generate("abc").text == "cba"
        client.close()


def test_a_hanging_engine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.client.connection.SILENCE_S", 0.7)
    with fake_engine(tmp_path, silent) as engine, Client(engine.address) as client:
        stream = client.stream("a")
        time.sleep(1.2)  # pings are answered: nothing happens
        engine.answers_pings = False
        with pytest.raises(EngineDeadError, match="has not answered for"):
            next(stream)


def test_a_hanging_handshake_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.client.connection.CONNECT_S", 0.2)
    monkeypatch.setattr("vibe_sgl_lite.runtime.client.connection.WELCOME_S", 0.5)
    with fake_engine(tmp_path) as engine:
        engine.answers_hellos = False
        start = time.monotonic()
        with pytest.raises(ConnectError):
            Client(engine.address)
        assert 0.6 < time.monotonic() - start < 10


def test_a_forgotten_session_ends_its_requests(client: Client, engine: FakeEngine) -> None:
    engine.script = silent
    stream = client.stream("a")
    engine.wait_for(Generate)
    engine.send(Refused(error=ErrorInfo(code="protocol", message="no such session")))
    with pytest.raises(EngineDeadError, match="no such session"):
        next(stream)
    engine.script = answer
    assert client.generate("abc").text == "cba"
    assert engine.count(Hello) == 2


def test_a_request_to_a_forgotten_session_ends_them_all(client: Client, engine: FakeEngine) -> None:
    """As after this process was stopped for a while: the engine has given the session up."""
    engine.script = silent
    stream = client.stream("a")
    engine.wait_for(Generate)
    engine.script = lambda r: [Refused(error=ErrorInfo(code="protocol", message="no such session"), rid=r.rid)]
    for call in (lambda: client.generate("b"), lambda: next(stream)):
        with pytest.raises(EngineDeadError, match="no such session"):
            call()


def test_a_wrong_protocol_is_told(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.client.connection.PROTOCOL", 99)
    with pytest.raises(ProtocolError, match="protocol 99"):
        Client(engine.address)


def test_garbage_from_the_engine_is_dropped(client: Client, engine: FakeEngine) -> None:
    class Nonsense(Refused, frozen=True):  # a tag that no client knows
        pass

    engine.send(Nonsense(error=ErrorInfo(code="x", message="y")))
    assert client.generate("abc").text == "cba"


def test_a_pause_between_reading_and_the_look_at_the_clock_is_no_silence(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this program: stopped, or busy with something that lets no other thread run."""
    monkeypatch.setattr(connection, "SILENCE_S", 2.0)
    receive, paused = ClientSocket.receive, threading.Event()

    def receive_late(line: ClientSocket) -> list[ServerMessage]:
        if client._connection._unanswered_since is None or paused.is_set():
            return receive(line)
        paused.set()
        time.sleep(2.5)
        return []  # what has come meanwhile is read in the next turn

    with Client(engine.address) as client:
        monkeypatch.setattr(ClientSocket, "receive", receive_late)
        assert paused.wait(30)
        assert client.generate("ab").text == "ba"
        assert engine.count(Hello) == 1
