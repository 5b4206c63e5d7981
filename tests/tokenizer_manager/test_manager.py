"""The manager without processes: a socket, a clock, threads and a scheduler that the tests move by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tokenizer_manager.harness import make_spec
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
    Chunks,
    ErrorInfo,
    Finish,
    Generate,
    Goodbye,
    Hello,
    Ping,
    Query,
    QueryReply,
    Refused,
    RequestRejected,
    RoutedChunk,
    SchedulerInput,
    SchedulerQuery,
    SchedulerReply,
    ServerMessage,
    Usage,
    encode_request,
    pack_ids,
)
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import CompilerArgs, GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.manager import THREADS, TokenizerManager
from vibe_sgl_lite.tokenizer_manager.memory import ENOUGH_BYTES, LOW_BYTES, MemoryWatch
from vibe_sgl_lite.tokenizer_manager.refusals import SESSION_BYTES, WAITING_BYTES
from vibe_sgl_lite.tokenizer_manager.sessions import Sent, Sessions
from vibe_sgl_lite.tokenizer_manager.validate import Prepared


class FakeSocket:
    """`state`: what a send to that identity comes to. `sent`: what each got."""

    def __init__(self) -> None:
        self.state: dict[bytes, Sent] = {}
        self.frames = 0
        self.sent: dict[bytes, list[ServerMessage]] = {}
        self._decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)

    def send(self, identity: bytes, frame: bytes) -> Sent:
        state = self.state.get(identity, Sent.YES)
        if state is Sent.YES:
            message = self._decoder.decode(frame)
            self.sent.setdefault(identity, []).extend(message.chunks if isinstance(message, Chunks) else [message])
            self.frames += 1
        return state


class World:
    def __init__(self, spec: PipelineSpec) -> None:
        self.time = 100.0
        self.free = 2.0**40  # bytes of memory
        self.socket = FakeSocket()
        self.to_scheduler: list[SchedulerInput] = []
        self.work: list[tuple[Callable[[], Prepared], Callable[[Future[Prepared]], None]]] = []
        self.sessions = Sessions(self.socket, self.time)  # type: ignore[arg-type]
        self.manager = TokenizerManager(
            spec,
            ChatTokenizer.from_folder(spec.tokenizer_folder),
            GrammarCompiler(CompilerArgs("", 0, ())),  # not asked
            self.sessions,
            lambda work, done: self.work.append((work, done)),
            self.to_scheduler.append,
            lambda: self.time,
            MemoryWatch(lambda: Limit(self.free, "a test")),
        )

    def say(self, identity: bytes, message: msgspec.Struct) -> None:
        self.manager.on_frame(identity, msgspec.msgpack.encode(message))

    def hello(self, identity: bytes) -> None:
        self.say(identity, Hello(PROTOCOL))

    def generate(self, identity: bytes, rid: str, prompt: str = "abc", payer: str = "", **sampling: Any) -> None:
        raw = msgspec.Raw(msgspec.msgpack.encode(sampling))
        self.say(identity, Generate(rid, prompt, None, None, raw, payer=payer))

    def tokenize(self, number: int = 0) -> None:
        work, done = self.work.pop(number)
        future: Future[Prepared] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        done(future)

    def added(self) -> list[AddRequest]:
        return [message for message in self.to_scheduler if isinstance(message, AddRequest)]

    def aborted(self) -> list[int]:
        return [message.uid for message in self.to_scheduler if isinstance(message, AbortRequest)]

    def chunk(self, added: AddRequest, first: int, text: str = "x", finish: Finish | None = None) -> None:
        """One token of the only sample."""
        usage = None if finish is None else Usage(3, first + 1)
        chunk = Chunk(added.rid, 0, first, pack_ids([7]), text, finish, usage)
        payload = msgspec.msgpack.encode(chunk)
        self.manager.on_engine(ChunkBatch([RoutedChunk(added.uid, finish is not None, payload, first + 1)]))

    def tick(self, seconds: float = 0.25) -> None:
        self.time += seconds
        self.manager.tick(self.time)

    def got(self, identity: bytes, kind: type[Any]) -> list[Any]:
        return [message for message in self.socket.sent.get(identity, []) if isinstance(message, kind)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PipelineSpec:
    return make_spec(Path(tmp_path_factory.mktemp("spec")))


@pytest.fixture
def world(spec: PipelineSpec) -> World:
    world = World(spec)
    world.hello(b"a")
    return world


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


def overloaded(world: World, identity: bytes) -> list[str]:
    assert {refused.error.code for refused in world.got(identity, Refused)} <= {"overloaded"}
    return [refused.rid for refused in world.got(identity, Refused)]


def test_prompts_that_wait_are_bounded_in_bytes(world: World) -> None:
    """Of each session and of all; what is tokenized or has ended makes room."""
    prompt = "x" * 60_000
    fit = SESSION_BYTES // len(prompt)
    for number in range(fit + 5):
        world.generate(b"a", f"r{number}", prompt)
    assert 5 <= len(overloaded(world, b"a")) <= 6
    assert world.manager.requests.load.waiting_bytes <= SESSION_BYTES
    for other in (b"b", b"c", b"d"):
        world.hello(other)
        for number in range(fit - 1):
            world.generate(other, f"r{number}", prompt)
        assert overloaded(world, other) == []
    assert world.manager.requests.load.waiting_bytes <= WAITING_BYTES
    world.hello(b"e")
    for number in range(10):
        world.generate(b"e", f"r{number}", prompt)
    assert len(overloaded(world, b"e")) >= 5
    world.say(b"b", Goodbye())
    world.tokenize()
    world.generate(b"e", "again", prompt)
    assert "again" not in overloaded(world, b"e")
    for identity in (b"a", b"c", b"d", b"e"):
        world.say(identity, Goodbye())
    assert (world.manager.requests.load.waiting_bytes, world.manager.requests.load.samples) == (0, 0)


def test_nothing_new_is_taken_while_memory_is_nearly_used_up(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.generate(b"a", "before")
    for free, taken in ((LOW_BYTES - 1, False), (LOW_BYTES + 1, False), (ENOUGH_BYTES, True), (LOW_BYTES, True)):
        world.free = free
        world.tick(1.0)
        world.generate(b"a", f"r{free}")
        assert (f"r{free}" not in overloaded(world, b"a")) == taken
    assert f"{LOW_BYTES >> 20} MiB of memory are free (a test)" in world.got(b"a", Refused)[-1].error.message
    assert len(caplog.records) == 2  # once when it begins, once when it ends
    world.free = 0
    world.tick(1.0)
    world.say(b"a", Query(1, "health"))
    [asked] = [message for message in world.to_scheduler if isinstance(message, SchedulerQuery) and message.qid]
    world.manager.on_engine(SchedulerReply(asked.qid, {"num_running": 1}))
    [health] = world.got(b"a", QueryReply)
    assert health.values["memory_low"] is True
    assert health.values["memory_free"] == 0
    raw = msgspec.Raw(msgspec.msgpack.encode({"max_new_tokens": 5, "seed": 1}))
    world.say(b"a", Generate("resumed", "abc", None, None, raw, resume_ids=[b"\1\0\0\0"]))  # no new work
    assert "resumed" not in overloaded(world, b"a")
    while world.work:  # what was taken before goes on
        world.tokenize()
    assert "before" in [added.rid for added in world.added()]


def test_who_comes_last_finds_room_where_one_client_has_filled_all(spec: PipelineSpec) -> None:
    small = msgspec.structs.replace(spec, args=ServerArgs(max_running_requests=4, max_queued_requests=12))
    world = World(small)
    for identity in (b"a", b"b", b"c", b"d"):
        world.hello(identity)
    for number in range(5):
        world.generate(b"a", f"r{number}", n=4)  # samples count
    assert overloaded(world, b"a") == ["r4"]
    for identity in (b"b", b"c", b"d"):
        world.generate(identity, "r0")
        world.generate(identity, "r1")
    assert [overloaded(world, identity) for identity in (b"b", b"c", b"d")] == [["r1"], ["r1"], ["r1"]]
    world.hello(b"e")
    world.generate(b"e", "r0")
    assert overloaded(world, b"e") == ["r0"]  # but no crowd does


def test_those_whom_a_client_serves_have_room_each(spec: PipelineSpec) -> None:
    world = World(msgspec.structs.replace(spec, args=ServerArgs(max_running_requests=4, max_queued_requests=12)))
    for identity in (b"w1", b"w2"):  # of one HTTP server
        world.hello(identity)
    for number in range(5):
        world.generate(b"w1", f"r{number}", payer="greedy", n=4)
    world.generate(b"w2", "more", payer="greedy")
    world.generate(b"w1", "one", payer="modest")
    assert (overloaded(world, b"w1"), overloaded(world, b"w2")) == (["r4"], ["more"])
    for identity in (b"w1", b"w2"):
        world.say(identity, Goodbye())
    assert world.manager.requests.load_of("greedy").samples == world.manager.requests.load.samples == 0


def test_health_tells_that_ranks_are_awaited(world: World) -> None:
    for ready, status in ((False, "recovering"), (True, "ok")):
        world.say(b"a", Query(1, "health"))
        asked = [message for message in world.to_scheduler if isinstance(message, SchedulerQuery) and message.qid][-1]
        world.manager.on_engine(SchedulerReply(asked.qid, {"ranks_ready": ready}))
        assert world.got(b"a", QueryReply)[-1].values["status"] == status


@pytest.mark.parametrize("opened", [True, False])
def test_nothing_long_is_echoed(world: World, opened: bool) -> None:
    long = "x" * 1_000_000
    identity = b"a" if opened else b"stranger"
    raw = msgspec.Raw(msgspec.msgpack.encode({long: 1}))
    for message in (
        Generate(long, "p", None, None, msgspec.Raw(b"\x80")),
        Generate("r", "p", None, None, raw),
        Generate("r", None, None, [{"role": long, "content": "c"}], msgspec.Raw(b"\x80")),
        Generate("r", None, None, [{"role": "user", "content": "c"}], msgspec.Raw(b"\x80"), template_kwargs={long: 1}),
        ["Generate", long, 5],
        ["Query", 1, long],
        [long],
        Hello(PROTOCOL, long),
        Abort(long),
    ):
        world.manager.on_frame(identity, msgspec.msgpack.encode(message))
    sent = sum(len(msgspec.msgpack.encode(message)) for message in world.socket.sent.get(identity, []))
    assert sent < 10_000
    assert all(len(session.client) <= 256 for session in world.sessions)


def test_a_frame_of_many_values_is_refused_undecoded(world: World) -> None:
    message = {"role": "user", "content": "c", "more": [[]] * 1_000_000}
    frame = msgspec.msgpack.encode(Generate("r", None, None, [message], msgspec.Raw(b"\x80")))
    start = time.process_time()
    for _ in range(16):
        world.manager.on_frame(b"a", frame)
    assert time.process_time() - start < 2
    refused = world.got(b"a", Refused)
    assert [(reply.rid, reply.error.code) for reply in refused] == [("r", "invalid_request")] * 16
    assert "values" in refused[0].error.message


def test_odd_values_in_tools_are_no_error_of_ours(world: World) -> None:
    """Numbers beyond 64 bits, which clients may send; keys that are lists, which none of ours does."""
    few = msgspec.Raw(msgspec.msgpack.encode({"max_new_tokens": 1}))
    for number, odd in enumerate(({"n": 10**40}, {(1, 2): "x"}, {"deep": [{(1, (2, "x")): 1}]})):
        kwargs = {"tools": [{"type": "function", "function": odd}]}
        messages = [{"role": "user", "content": "c"}]
        message = Generate(f"r{number}", None, None, messages, few, template_kwargs=kwargs)
        world.manager.on_frame(b"a", encode_request(message))
        while world.work:
            world.tokenize()
    assert [accepted.rid for accepted in world.got(b"a", Accepted)] == ["r0"]
    assert [(refused.rid, refused.error.field) for refused in world.got(b"a", Refused)] == [
        ("r1", "template_kwargs"), ("r2", "template_kwargs")
    ]  # fmt: skip


def test_client_found_gone_when_it_is_accepted(world: World) -> None:
    world.generate(b"a", "r")
    world.socket.state[b"a"] = Sent.GONE
    world.tokenize()
    assert world.added() == []
    assert (len(world.manager.requests), len(world.sessions)) == (0, 0)


def test_hello_again_begins_anew(world: World) -> None:
    world.generate(b"a", "r")
    world.tokenize()
    world.hello(b"a")
    assert world.aborted() == [world.added()[0].uid]
    world.generate(b"a", "r")
    world.tokenize()
    assert world.added()[1].uid > world.added()[0].uid
    world.chunk(world.added()[0], 0, "old")
    assert world.got(b"a", Chunk) == []


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


def test_silence(world: World) -> None:
    world.hello(b"b")
    world.generate(b"a", "r")
    world.tokenize()
    for _ in range(9):
        world.tick()
        world.say(b"b", Ping())
    assert len(world.sessions) == 2
    world.tick(0.3)
    assert len(world.sessions) == 1
    assert world.aborted() == [world.added()[0].uid]
    world.say(b"a", Ping())
    assert isinstance(world.socket.sent[b"a"][-1], Refused)


def test_our_own_pause_is_no_silence(world: World) -> None:
    world.tick(0.25)
    world.tick(60.0)
    assert len(world.sessions) == 1
    for _ in range(20):  # nor is what waits unread while others are read
        world.time += 0.25
        world.manager.tick(world.time - 0.25 * 20)
    assert len(world.sessions) == 1


def test_lagging_client_gets_merged_chunks(world: World) -> None:
    world.generate(b"a", "r")
    world.tokenize()
    added = world.added()[0]
    world.socket.state[b"a"] = Sent.FULL
    for place in range(50):
        world.chunk(added, place, str(place % 10), Finish("length") if place == 49 else None)
    world.say(b"a", Ping(5))
    world.tick()
    assert world.got(b"a", Chunk) == []
    world.socket.state[b"a"] = Sent.YES
    world.tick()
    [chunk] = world.got(b"a", Chunk)
    assert (chunk.first, chunk.text, chunk.finish) == (0, "0123456789" * 5, Finish("length"))
    assert (chunk.token_ids, chunk.usage) == (pack_ids([7] * 50), Usage(3, 50))
    assert world.aborted() == []


@pytest.mark.parametrize("why", ["bytes", "time"])
def test_client_that_falls_behind(world: World, why: str) -> None:
    world.hello(b"b")
    for identity in (b"a", b"b"):
        world.generate(identity, "r")
        world.tokenize()
    slow, good = world.added()
    world.socket.state[b"a"] = Sent.FULL
    text = "x" * (30_000 if why == "bytes" else 10)
    place = 0
    while not world.aborted():
        world.chunk(slow, place, text)
        world.chunk(good, place, text)
        place += 1
        for identity in (b"a", b"b"):
            world.say(identity, Ping())
        world.tick()
    assert world.aborted() == [slow.uid]
    seconds, size = place * 0.25, place * len(text)
    assert seconds == pytest.approx(10.25) if why == "time" else 1024 * 1024 - 30_000 < size < 1024 * 1024 + 30_000
    assert len(world.got(b"b", Chunk)) == place
    world.chunk(slow, place, "late", Finish("abort"))  # the scheduler's answer to the abort
    world.socket.state[b"a"] = Sent.YES
    world.tick()
    [chunk] = world.got(b"a", Chunk)
    assert (chunk.text, chunk.finish, chunk.usage) == (text * place, Finish("abort"), Usage(3, place))
    world.generate(b"a", "again")  # the session goes on
    world.tokenize()
    assert len(world.got(b"a", Accepted)) == 2


def test_client_that_takes_nothing_and_asks_on(world: World) -> None:
    world.socket.state[b"a"] = Sent.FULL
    for _ in range(100_000):
        world.generate(b"a", "r" * 250, top_k=-7)
        if not len(world.sessions):
            break
    assert len(world.sessions) == 0


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


def test_drain_waits_for_outboxes_but_not_for_the_dead(world: World) -> None:
    world.generate(b"a", "r")
    world.tokenize()
    world.socket.state[b"a"] = Sent.FULL
    world.manager.abort_all(None)
    assert not world.manager.take_drained()
    world.tick(0.6)
    assert world.manager.take_drained()


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
                    identity, f"r{number}", chance.choice(["abc", "", "xyz"]), top_k=chance.choice([0, 3, 3, 3])
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


def end_of(world: World, uid: int) -> bytes:
    request = world.manager.requests.by_uid(uid)
    assert request is not None
    tokens = request.tokens[0]
    return msgspec.msgpack.encode(Chunk(request.rid, 0, tokens, b"", "", Finish("length"), Usage(3, tokens)))


def test_requests_error_keeps_its_field(world: World) -> None:
    world.generate(b"a", "r", min_p=7)
    [refused] = world.got(b"a", Refused)
    assert refused.error == ErrorInfo(RequestError.code, "min_p=7.0: must be at least 0 and at most 1", "min_p")
