"""The manager's requests: accepted, aborted, answered, and each with exactly one end."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from tests.tokenizer_manager.world import World, end_of
from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    AbortRequest,
    Accepted,
    AddRequest,
    Chunk,
    ChunkBatch,
    ErrorInfo,
    Finish,
    Goodbye,
    Hello,
    Ping,
    Query,
    QueryReply,
    Refused,
    RequestRejected,
    RoutedChunk,
    SchedulerQuery,
    SchedulerReply,
    Usage,
    pack_ids,
)
from vibe_sgl_lite.tokenizer_manager.manager import THREADS
from vibe_sgl_lite.tokenizer_manager.sessions import Sent
from vibe_sgl_lite.tokenizer_manager.validate import Prepared


def test_a_step_goes_to_each_client_in_one_message(world: World) -> None:
    world.hello(b"b")
    for identity, rid in ((b"a", "r1"), (b"b", "r2"), (b"a", "r3"), (b"a", "r4")):
        world.generate(identity, rid)
    while world.work:
        world.tokenize()
    world.socket.frames = 0
    end = Finish("stop", matched=2)
    routed = [
        RoutedChunk(added.uid, added.rid == "r3", msgspec.msgpack.encode(made), 1)
        for added in world.added()
        for made in [Chunk(added.rid, 0, 0, pack_ids([7]), added.rid, end if added.rid == "r3" else None)]
    ]
    late = RoutedChunk(1, False, msgspec.msgpack.encode(Chunk("late", 0, 0, b"", "")), 1)
    world.manager.on_engine(ChunkBatch([late, *routed]))
    assert world.socket.frames == 2
    assert sorted(chunk.text for chunk in world.got(b"a", Chunk)) == ["r1", "r3", "r4"]
    assert [chunk.rid for chunk in world.got(b"b", Chunk)] == ["r2"]
    assert len(world.manager.requests) == 3
    world.socket.state[b"a"] = Sent.FULL  # what waits is merged a sample, as ever
    for first in range(1, 40):
        batch = [
            RoutedChunk(
                added.uid, False, msgspec.msgpack.encode(Chunk(added.rid, 0, first, pack_ids([7]), "x")), first + 1
            )
            for added in world.added()
        ]
        world.manager.on_engine(ChunkBatch(batch))
    world.socket.state[b"a"] = Sent.YES
    world.socket.frames = 0
    world.tick()
    assert world.socket.frames == 2
    assert [chunk.text for chunk in world.got(b"a", Chunk)[-2:]] == ["x" * 39] * 2


def test_abort_while_tokenizing(world: World) -> None:
    world.generate(b"a", "r")
    world.say(b"a", Abort("r"))
    [end] = world.got(b"a", Chunk)
    assert (end.rid, end.finish, end.usage) == ("r", Finish("abort"), Usage(0, 0))
    world.generate(b"a", "r")  # the name is free again, while the first is still in its thread
    world.tokenize(0)
    assert world.added() == []
    world.tokenize(0)
    assert len(world.added()) == 1
    assert len(world.got(b"a", Accepted)) == 1
    assert len(world.got(b"a", Chunk)) == 1


def test_an_abort_among_fellows(world: World) -> None:
    """A worker that does not know a request ends it at the worker that does; clients of another name are left alone."""
    for identity, client in ((b"w1", "http"), (b"w2", "http"), (b"n", "native")):
        world.say(identity, Hello(PROTOCOL, client))
        world.generate(identity, "r")
        world.generate(identity, "s")
    for _ in range(THREADS):
        world.tokenize()
    uids = {added.uid for added in world.added()}
    world.say(b"w1", Abort("r", fellows=True))
    ended = [c.rid for name in (b"w1", b"w2") for c in world.got(name, Chunk)]
    assert len(world.aborted()) + len(ended) == 2
    assert set(world.aborted()) <= uids
    assert set(ended) <= {"r"}
    world.say(b"w2", Abort("", fellows=True))
    assert world.manager.requests.num_tokenizing <= 2
    left = {added.uid for added in world.added()} - set(world.aborted())
    assert all(world.manager.requests.by_uid(uid).session.client == "native" for uid in left)  # type: ignore[union-attr]
    assert world.got(b"n", Chunk) == []


def test_those_whom_a_client_serves_take_turns(world: World) -> None:
    """In the queue for a tokenizer as at the scheduler; who is named by nobody is the session."""
    for number in range(THREADS + 2):
        world.generate(b"a", f"many{number}", payer="greedy")
    world.generate(b"a", "one", payer="modest")
    world.generate(b"a", "own")
    while world.work:
        world.tokenize()
    added = world.added()
    assert {message.rid for message in added[: THREADS + 3]} >= {"one", "own"}
    sessions = {message.rid: message.session for message in added}
    assert (sessions["many0"], sessions["one"]) == ("greedy", "modest")
    assert sessions["own"] == world.sessions.find(b"a").token  # type: ignore[union-attr]


def test_client_gone_while_tokenizing(world: World) -> None:
    world.generate(b"a", "r")
    world.say(b"a", Goodbye())
    world.tokenize()
    assert world.to_scheduler == []
    assert len(world.manager.requests) == 0


def test_what_a_client_left_behind_is_not_tokenized(world: World) -> None:
    """Those in a thread go on, the rest is dropped; another client's is next."""
    world.hello(b"b")
    for number in range(300):
        world.generate(b"a", f"r{number}")
    world.generate(b"b", "r")
    assert len(world.work) == THREADS
    world.say(b"a", Goodbye())
    for _ in range(THREADS + 1):
        world.tokenize(0)
    assert world.work == []
    assert len(world.got(b"b", Accepted)) == 1


def test_health_tells_that_ranks_are_awaited(world: World) -> None:
    for ready, status in ((False, "recovering"), (True, "ok")):
        world.say(b"a", Query(1, "health"))
        asked = [message for message in world.to_scheduler if isinstance(message, SchedulerQuery) and message.qid][-1]
        world.manager.on_engine(SchedulerReply(asked.qid, {"ranks_ready": ready}))
        assert world.got(b"a", QueryReply)[-1].values["status"] == status


def test_tokenizing_fails_unexpectedly(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.generate(b"a", "r")
    _, done = world.work.pop()
    future: Future[Prepared] = Future()
    future.set_exception(KeyError("boom"))
    done(future)
    [refused] = world.got(b"a", Refused)
    assert (refused.rid, refused.error.code) == ("r", "internal_error")
    assert "boom" in caplog.text


def test_checking_fails_unexpectedly(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise OverflowError("boom")

    monkeypatch.setattr("vibe_sgl_lite.tokenizer_manager.manager.check", broken)
    world.generate(b"a", "r")
    monkeypatch.undo()
    [refused] = world.got(b"a", Refused)
    assert (refused.rid, refused.error.code) == ("r", "internal_error")
    assert "boom" in caplog.text
    world.generate(b"a", "r")
    assert len(world.work) == 1


def test_several_samples(world: World) -> None:
    session = world.sessions.find(b"a")
    assert session is not None
    table = world.manager.requests
    request = table.add(session, "r", 3, 10)
    uid = table.number(request, 5)
    other = table.add(session, "s", 1, 10)
    assert table.number(other, 5) == uid + 3
    payload = msgspec.msgpack.encode(Chunk("r", 1, 0, b"", "", Finish("length"), Usage(5, 2)))
    world.manager.on_engine(ChunkBatch([RoutedChunk(uid + 1, True, payload, 2)]))
    assert table.find(session, "r") is request
    world.manager.abort_all(None)
    ends = world.got(b"a", Chunk)
    assert sorted((end.rid, end.index) for end in ends) == [("r", 0), ("r", 1), ("r", 2), ("s", 0)]
    assert world.aborted() == [uid, uid + 3]
    assert len(table) == 0
    assert world.manager.take_drained()
    assert not world.manager.take_drained()


@pytest.mark.parametrize("seed", range(60))
def test_exactly_one_terminal_event(spec: PipelineSpec, seed: int) -> None:
    """Random orders of everything that can happen to requests."""
    chance = random.Random(seed)
    world = World(spec)
    identities = [b"a", b"b", b"c"]
    lost: set[bytes] = set()
    for identity in identities:
        world.hello(identity)
    asked: list[tuple[bytes, str]] = []
    running: dict[int, list[Any]] = {}  # uid -> [AddRequest, tokens]; the engine's side
    seen = 0
    for number in range(300):
        identity = chance.choice(identities)
        match chance.randrange(10):
            case 0 | 1 | 2:
                asked.append((identity, f"r{number}"))
                world.generate(
                    identity, f"r{number}", chance.choice(["abc", "", "xyz"]), top_k=chance.choice([-7, 3, 3, 3])
                )
            case 3 | 4 if world.work:
                world.tokenize(chance.randrange(len(world.work)))
            case 5 if asked:
                owner, rid = chance.choice(asked)
                world.say(owner, Abort(rid))
            case 6 | 7 if running:
                uid = chance.choice(list(running))
                added, tokens = running[uid]
                world.chunk(added, tokens, "x", chance.choice([None, None, Finish("length")]))
                running[uid][1] += 1
                if world.manager.requests.by_uid(uid) is None:
                    del running[uid]
            case 8 if running:
                uid = chance.choice(list(running))
                if running.pop(uid)[1] == 0:
                    world.manager.on_engine(RequestRejected(uid, ErrorInfo("overloaded", "full")))
                elif world.manager.requests.by_uid(uid) is not None:
                    world.manager.on_engine(ChunkBatch([RoutedChunk(uid, True, end_of(world, uid), 0)]))
            case 9:
                world.socket.state[identity] = chance.choice([Sent.YES, Sent.FULL, Sent.YES, Sent.GONE])
                if world.socket.state[identity] is Sent.GONE:
                    lost.add(identity)
        for message in world.to_scheduler[seen:]:
            if isinstance(message, AddRequest):
                running[message.uid] = [message, 0]
            elif isinstance(message, AbortRequest) and message.uid in running:
                added, tokens = running.pop(message.uid)
                world.chunk(added, tokens, "", Finish("abort"))
        seen = len(world.to_scheduler)
        for other in identities:
            world.say(other, Ping())
        world.tick(chance.choice([0.0, 0.25]))
    for identity in identities:
        if identity not in lost:
            world.socket.state[identity] = Sent.YES
    while world.work:
        world.tokenize()
    world.manager.abort_all(ErrorInfo("engine_dead", "over"))
    world.tick(0.0)
    assert len(world.manager.requests) == 0
    for identity, rid in asked:
        ends = [c for c in world.got(identity, Chunk) if c.rid == rid and c.finish is not None]
        ends += [refused for refused in world.got(identity, Refused) if refused.rid == rid]
        assert len(ends) <= 1 if identity in lost else len(ends) == 1
        firsts = 0
        for chunk in world.got(identity, Chunk):
            if chunk.rid == rid:
                assert chunk.first == firsts
                firsts += len(chunk.token_ids) // 4


def test_requests_error_keeps_its_field(world: World) -> None:
    world.generate(b"a", "r", min_p=7)
    [refused] = world.got(b"a", Refused)
    assert refused.error == ErrorInfo(RequestError.code, "min_p=7.0: must be at least 0 and at most 1", "min_p")
