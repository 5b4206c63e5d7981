"""The sync client against a fake engine: what it returns, what it sends, and many threads of one client."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.runtime.client.fake_engine import MODEL, STOP, FakeEngine, accepted, answer, chunk, silent
from vibe_sgl_lite import Client, SamplingParams
from vibe_sgl_lite.runtime.errors import ClosedError, OverloadedError, ProtocolError
from vibe_sgl_lite.runtime.messages import ErrorInfo, Generate, Ping, ServerMessage, Usage


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
        client._connection._commands.post(lambda: [][0])
        with pytest.raises(ClosedError):
            next(stream)
        client._connection._thread.join(5)
    finally:
        threading.excepthook = hook
    assert crashes == [IndexError]
    with pytest.raises(ClosedError):
        client.generate("a")
