"""The sync client against a fake engine: what it returns, what it sends, and that no call ever waits for ever."""

from __future__ import annotations

import errno
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.runtime.client.fake_engine import (
    MODEL,
    STOP,
    FakeEngine,
    accepted,
    answer,
    chunk,
    failing,
    fake_engine,
    silent,
)
from vibe_sgl_lite import Client, SamplingParams
from vibe_sgl_lite.runtime.errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    EngineDeadError,
    EngineError,
    KVExhaustedError,
    NumericalError,
    OverloadedError,
    ProtocolError,
    RequestError,
)
from vibe_sgl_lite.runtime.messages import (
    Abort,
    ErrorInfo,
    Finish,
    Generate,
    Goodbye,
    Hello,
    Ping,
    Refused,
    ServerMessage,
    Usage,
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with fake_engine(tmp_path) as fake:
        yield fake


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[Client]:
    with Client(engine.address) as c:
        yield c


# ---------------------------------------------------------------------------------------------------- what comes back


def test_one_prompt_gives_one_output(client: Client) -> None:
    out = client.generate("abc", SamplingParams(seed=7), rid="mine")
    assert (out.text, out.token_ids, out.finish_reason, out.matched) == ("cba", [99, 98, 97], "stop", 0)
    assert out.usage == Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=2)
    assert (out.rid, out.error) == ("mine", None)
    assert out.sampling is not None
    assert out.sampling.seed == 7


def test_lists_keep_their_order(client: Client, engine: FakeEngine) -> None:
    held: list[Generate] = []

    def backwards(request: Generate) -> list[ServerMessage]:
        held.append(request)
        return [m for r in reversed(held) for m in answer(r)] if len(held) == 5 else []

    engine.script = backwards
    prompts = ["a0", "b1", "c2", "d3", "e4"]
    assert [out.text for out in client.generate(prompts)] == ["0a", "1b", "2c", "3d", "4e"]


def test_ids_flat_and_nested(client: Client, engine: FakeEngine) -> None:
    assert client.generate(input_ids=[0, 1]).text == "AB"
    assert client.generate([0, 1, 2]).text == "ABC"
    assert [out.text for out in client.generate(input_ids=[[0], [1, 2]])] == ["A", "BC"]
    assert [out.text for out in client.generate([[3], [4]])] == ["D", "E"]
    assert len(client.generate(list[str]())) == 0
    assert all(request.prompt is None for request in engine.wait_for(Generate, 6))


def test_params_one_for_all_or_each_its_own(client: Client) -> None:
    outs = client.generate(["a", "b"], [SamplingParams(seed=1), SamplingParams(seed=2)])
    assert [out.sampling.seed for out in outs if out.sampling] == [1, 2]
    outs = client.generate(["a", "b"], SamplingParams(seed=3))
    assert [out.sampling.seed for out in outs if out.sampling] == [3, 3]


def test_chat(client: Client, engine: FakeEngine) -> None:
    hi = [{"role": "user", "content": "hi"}]
    assert client.chat(hi, enable_thinking=False).text == "ih"
    assert [out.text for out in client.chat([hi, [*hi, {"role": "user", "content": "you"}]])] == ["ih", "uoy"]
    first, second, _ = engine.wait_for(Generate, 3)
    assert (first.messages, first.template_kwargs) == (hi, {"enable_thinking": False})
    assert second.template_kwargs is None


def test_stream_gives_deltas_and_a_last_chunk(client: Client) -> None:
    stream = client.stream("abc", rid="r")
    chunks = list(stream)
    assert [c.text for c in chunks] == ["c", "b", "a"]
    assert [c.token_ids for c in chunks] == [[99], [98], [97]]
    assert [c.finish_reason for c in chunks] == [None, None, "stop"]
    assert [c.usage is None for c in chunks] == [True, True, False]
    assert {c.index for c in chunks} == {0}
    assert stream.sampling is not None
    assert next(stream, None) is None
    assert "".join(c.text for c in client.stream_chat([{"role": "user", "content": "hi"}])) == "ih"


def test_priority_and_salt_travel(client: Client, engine: FakeEngine) -> None:
    client.generate("a", priority=5, cache_salt="s")
    assert [(r.priority, r.cache_salt) for r in engine.wait_for(Generate)] == [(5, "s")]


def test_queries(client: Client, engine: FakeEngine) -> None:
    assert client.stats() == {"num_running": 0}
    assert client.health() == {"num_running": 0}
    assert client.model == MODEL
    assert client.address == engine.address
    engine.query_error = ErrorInfo(code="overloaded", message="2 requests run")
    with pytest.raises(OverloadedError, match="2 requests run"):
        client.flush_cache()


def test_more_prompts_than_the_window(client: Client, engine: FakeEngine) -> None:
    assert len(client.generate(["ab"] * 2500)) == 2500
    assert engine.count(Generate) == 2500


def test_repeats_are_dropped(client: Client, engine: FakeEngine) -> None:
    def script(request: Generate) -> list[ServerMessage]:
        a, b, c = (chunk(request.rid, i, t, STOP if i == 2 else None) for i, t in enumerate("xyz"))
        return [accepted(request), a, a, b, a, b, c, c]

    engine.script = script
    assert [client.generate("a").text for _ in range(3)] == ["xyz"] * 3
    assert [c.text for c in client.stream("a")] == ["x", "y", "z"]


def test_a_repeat_that_brings_the_end_still_ends(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "xy"), chunk(r.rid, 0, "xy", STOP)]
    assert client.generate("a").text == "xy"


def test_lost_tokens_are_an_error(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "x"), chunk(r.rid, 2, "z", STOP)]
    with pytest.raises(ProtocolError, match="token 2 of sample 0 came where 1 was due"):
        client.generate("a")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("overloaded", OverloadedError),
        ("kv_exhausted", KVExhaustedError),
        ("numerical_error", NumericalError),
        ("engine_dead", EngineDeadError),
        ("whatever", EngineError),
    ],
)
def test_a_failure_raises_its_error_with_what_there_was(
    client: Client, engine: FakeEngine, code: str, kind: type[EngineError]
) -> None:
    engine.script = failing(code, "ab")
    with pytest.raises(kind, match=f"because of {code}") as caught:
        client.generate("x")
    assert vars(caught.value)["output"].text == "ab"
    assert vars(caught.value)["output"].finish_reason == "error"
    with pytest.raises(kind, match=f"because of {code}"):
        list(client.stream("x"))


def test_an_invalid_request_raises_by_name(client: Client, engine: FakeEngine) -> None:
    info = ErrorInfo(code="invalid_request", message="top_p=3 is too much", field="top_p")
    engine.script = lambda r: [Refused(error=info, rid=r.rid)]
    for call in (lambda: client.generate("a"), lambda: list(client.stream("a")), lambda: client.generate(["a", "b"])):
        with pytest.raises(RequestError, match="too much") as caught:
            call()
        assert caught.value.field == "top_p"


def test_an_invalid_one_in_a_list_aborts_the_others(client: Client, engine: FakeEngine) -> None:
    info = ErrorInfo(code="invalid_request", message="no", field="prompt")
    engine.script = lambda r: [Refused(error=info, rid=r.rid)] if r.prompt == "bad" else silent(r)
    with pytest.raises(RequestError):
        client.generate(["a", "bad", "c"], rid=["1", "2", "3"])
    engine.wait_for(Abort, 2)
    assert sorted(engine.aborted()) == ["1", "3"]


def test_failures_in_a_list_are_outputs(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: failing("kv_exhausted", "")(r) if r.prompt == "big" else answer(r)
    small, big = client.generate(["ab", "big"])
    assert (small.finish_reason, small.text) == ("stop", "ba")
    assert big.finish_reason == "error"
    assert isinstance(big.error, KVExhaustedError)


def test_abort_is_an_ordinary_end(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "par")]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "x", rid="r")
        engine.wait_for(Generate)
        client.abort("r")
        client.abort("unknown")
        engine.wait_for(Abort)
        engine.send(chunk("r", 3, "", Finish(reason="abort")))
        out = future.result(30)
    assert (out.text, out.finish_reason) == ("par", "abort")
    assert engine.aborted() == ["r"]


@pytest.mark.parametrize("rid", [5, None, b"r", ["r"]])
def test_what_is_no_rid_cannot_be_aborted(client: Client, rid: Any) -> None:
    with pytest.raises(RequestError, match=r"rid=.* must be a text"):
        client.abort(rid)
    client.abort("\ud800")  # nobody's


def test_a_rid_in_flight_is_refused_until_it_has_ended(client: Client, engine: FakeEngine) -> None:
    engine.script = silent
    stream = client.stream("x", rid="r")
    with pytest.raises(RequestError, match="still in flight") as caught:
        client.generate("y", rid="r")
    assert caught.value.field == "rid"
    engine.wait_for(Generate)
    stream.close()
    with pytest.raises(RequestError, match="still in flight"):  # its end has not come yet
        client.generate("y", rid="r")
    engine.script = answer
    engine.send(chunk("r", 0, "", Finish(reason="abort")))
    client.stats()
    assert client.generate("y", rid="r").text == "y"


# -------------------------------------------------------------------------------------------------- leaving, closing


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


# ------------------------------------------------------------------------------------------------------- engine death


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


def test_the_default_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConnectError, match=f"{tmp_path}/vibe-sgl-lite/default/api.sock"):
        Client()
    with pytest.raises(ConnectError, match=f"{tmp_path}/vibe-sgl-lite/other/api.sock"):
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


# ------------------------------------------------------------------------------------------------------------ threads


def test_a_slow_consumer_keeps_pinging(client: Client, engine: FakeEngine) -> None:
    stream = client.stream("abc")
    next(stream)
    before = engine.count(Ping)
    time.sleep(2.1)
    assert engine.count(Ping) - before >= 3
    assert [c.text for c in stream] == ["b", "a"]


def test_many_threads_use_one_client(client: Client) -> None:
    def work(n: int) -> None:
        for i in range(20):
            text = f"{n} and {i}"
            if i % 3 == 0:
                assert "".join(c.text for c in client.stream(text)) == text[::-1]
            elif i % 3 == 1:
                assert [out.text for out in client.generate([text, "x"])] == [text[::-1], "x"]
            else:
                assert client.generate(text).text == text[::-1]
                assert client.stats() == {"num_running": 0}

    with ThreadPoolExecutor(32) as pool:
        for future in [pool.submit(work, n) for n in range(32)]:
            future.result(30)


def test_a_crash_of_the_thread_leaves_nobody_waiting(engine: FakeEngine) -> None:
    """Should our own code fail, callers get an error and not silence."""
    client = Client(engine.address)
    engine.script = silent
    stream = client.stream("a")
    engine.wait_for(Generate)
    hook, crashes = threading.excepthook, []
    threading.excepthook = lambda args: crashes.append(args.exc_type)
    try:
        client._connection._post(lambda: [][0])
        with pytest.raises(ClosedError):
            next(stream)
        client._connection._thread.join(5)
    finally:
        threading.excepthook = hook
    assert crashes == [IndexError]
    with pytest.raises(ClosedError):
        client.generate("a")
