"""What the manager refuses: more than it has room for, and what is too long or odd to be a request."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.tokenizer_manager.world import World
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Generate,
    Goodbye,
    Hello,
    Query,
    QueryReply,
    Refused,
    SchedulerQuery,
    SchedulerReply,
    encode_request,
)
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.tokenizer_manager.memory import ENOUGH_BYTES, LOW_BYTES
from vibe_sgl_lite.tokenizer_manager.refusals import SESSION_BYTES, WAITING_BYTES


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
