"""Requests that end early: aborts, lost clients, a drain and a shutdown."""

import time

import pytest

from tests.tokenizer_manager.harness import TextSide, stats, text_side
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    AbortAll,
    AbortRequest,
    Accepted,
    Chunk,
    Drain,
    ErrorInfo,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    Shutdown,
    Welcome,
)


def test_abort(side: TextSide) -> None:
    side.scheduler.repeat, side.scheduler.pause_s = 10_000, 0.01
    client, other = side.client(), side.client()
    client.generate("r", "abc", sampling={"max_new_tokens": 1000})
    assert isinstance(client.receive(), Accepted)
    assert isinstance(client.receive(), Chunk)
    other.send(Abort("r"))  # not its request
    client.send(Abort("unknown"))
    assert isinstance(client.receive(), Chunk)
    client.send(Abort("r"))
    end = client.finish("r")[-1]
    assert end.finish is not None
    assert end.finish.reason == "abort"
    assert end.usage is not None
    assert end.usage.completion_tokens == end.first + len(end.token_ids) // 4


def test_goodbye_ends_requests(side: TextSide) -> None:
    side.scheduler.hold = True
    client = side.client()
    client.generate("r", "abc")
    uid = side.scheduler.added("r").uid
    client.send(Goodbye())
    side.scheduler.aborted(uid, 1.0)


def test_silent_client_is_dead_and_a_stranger_afterwards(side: TextSide) -> None:
    side.scheduler.hold = True
    client, other = side.client(), side.client()
    client.generate("r", "abc")
    other.generate("o", "abc")
    uid, other_uid = side.scheduler.added("r").uid, side.scheduler.added("o").uid
    start = time.monotonic()
    while not any(isinstance(m, AbortRequest) for m in side.scheduler.heard):
        other.send(Ping())
        time.sleep(0.1)
        assert time.monotonic() - start < 30
    assert time.monotonic() - start > 2.0
    side.scheduler.aborted(uid)
    assert not any(isinstance(m, AbortRequest) and m.uid == other_uid for m in side.scheduler.heard)
    assert isinstance(client.receive(), Accepted)
    client.send(Ping())
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert (reply.error.code, reply.rid) == ("protocol", None)
    client.generate("again", "abc")
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert reply.rid == "again"
    client.send(Hello(PROTOCOL))
    assert isinstance(client.receive(), Welcome)


def test_vanished_client(side: TextSide) -> None:
    """While text flows, a closed connection is noticed at once, not after the silence."""
    side.scheduler.repeat, side.scheduler.pause_s = 10_000, 0.01
    client = side.client()
    client.generate("r", "abc", sampling={"max_new_tokens": 1000})
    uid = side.scheduler.added("r").uid
    client.receive()
    client.close()
    side.scheduler.aborted(uid, 1.0)


def test_slow_consumer_is_aborted_and_others_are_not() -> None:
    with text_side() as side:
        side.scheduler.repeat = 1000
        slow, good = side.client(hwm=1), side.client()
        prompt = "abcdefgh" * 400
        for number in range(8):
            slow.generate(f"s{number}", prompt, sampling={"max_new_tokens": 100})
        uids = [side.scheduler.added(f"s{number}").uid for number in range(8)]
        side.scheduler.repeat = 1
        good.generate("g", "hello there", sampling={"max_new_tokens": 100})
        deadline = time.monotonic() + 20
        while not any(isinstance(m, AbortRequest) for m in side.scheduler.heard) and time.monotonic() < deadline:
            slow.send(Ping())
            good.send(Ping())
            time.sleep(0.05)
        for uid in uids:
            side.scheduler.aborted(uid)
        assert "".join(chunk.text for chunk in good.finish("g")) == "hello there"
        # It was told, once each and without a gap, when it reads at last.
        received = dict.fromkeys((f"s{number}" for number in range(8)), 0)
        ended: list[str] = []
        while len(ended) < 8:
            message = slow.receive()
            if isinstance(message, Chunk):
                assert message.first == received[message.rid]
                received[message.rid] += len(message.token_ids) // 4
                if message.finish is not None:
                    assert message.finish.reason == "abort"
                    ended.append(message.rid)
        assert sorted(ended) == sorted(received)
        assert stats(good)["sessions_behind_total"] >= 1


def test_drain_then_shutdown() -> None:
    with text_side() as side:
        client = side.client()
        client.generate("r", "abc" * 20, sampling={"max_new_tokens": 100})
        side.scheduler.pause_s = 0.01
        assert isinstance(client.receive(), Accepted)
        side.launcher.tell("tokenizer_manager", Drain())
        time.sleep(0.1)
        client.generate("late", "abc")
        client.send(Query(1, "health"))
        messages = []
        while not (isinstance(message := client.receive(), Chunk) and message.finish is not None):
            messages.append(message)
        [refused] = [message for message in messages if isinstance(message, Refused)]
        assert (refused.rid, refused.error.code) == ("late", "draining")
        assert "draining" in refused.error.message
        [health] = [message for message in messages if isinstance(message, QueryReply)]
        assert (health.values["status"], health.values["draining"]) == ("draining", True)
        side.drained()
        side.launcher.tell("tokenizer_manager", Shutdown())
        goodbye = client.receive()
        assert isinstance(goodbye, Refused)
        assert (goodbye.error.code, goodbye.rid) == ("engine_dead", None)
        assert side.launcher.processes["tokenizer_manager"].wait(30) == 0
        side.launcher.tell("detokenizer", Shutdown())
        assert side.launcher.processes["detokenizer"].wait(30) == 0


@pytest.mark.parametrize("error", [None, ErrorInfo("engine_dead", "the worker died")])
def test_abort_all(error: ErrorInfo | None) -> None:
    with text_side() as side:
        side.scheduler.hold = True
        clients = [side.client() for _ in range(3)]
        for client in clients:
            for number in range(3):
                client.generate(f"r{number}", "abc")
                assert isinstance(client.receive(), Accepted)
        side.launcher.tell("tokenizer_manager", AbortAll(error))
        side.drained(1.0)
        for client in clients:
            ends = [client.receive() for _ in range(3)]
            assert {end.rid for end in ends if isinstance(end, Chunk)} == {"r0", "r1", "r2"}
            for end in ends:
                assert isinstance(end, Chunk)
                assert end.finish is not None
                assert (end.finish.reason, end.finish.error) == ("abort" if error is None else "error", error)
            client.send(Ping(4))
            assert client.receive() == Pong(4)  # nothing else came
            client.generate("late", "abc")
            refused = client.receive()
            assert isinstance(refused, Refused)
            assert refused.error.code == ("draining" if error is None else "engine_dead")


def test_drain_when_idle_and_heartbeats() -> None:
    with text_side() as side:
        side.launcher.tell("tokenizer_manager", Drain())
        side.drained(1.0)
        seen = len(side.launcher.wait_for(Heartbeat))
        side.launcher.wait_for(Heartbeat, seen + 6, timeout_s=3.0)  # two a second of each
        names = {message.name for message in side.launcher.heard if isinstance(message, Heartbeat)}
        assert names == {"tokenizer_manager", "detokenizer"}
