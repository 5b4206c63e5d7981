"""What the manager does for clients that come back, for the program that owns the engine, and with the pool's size."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from tests.tokenizer_manager.world import World
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Chunk,
    ErrorInfo,
    Finish,
    Generate,
    Hello,
    Refused,
    SchedulerQuery,
    SchedulerReply,
    Welcome,
    pack_ids,
)
from vibe_sgl_lite.tokenizer_manager.sessions import Sent


def again(world: World, resume_ids: list[bytes | None] | None, **sampling: Any) -> None:
    values = {"seed": 1, "n": len(resume_ids or [0]), "max_new_tokens": 10, **sampling}
    raw = msgspec.Raw(msgspec.msgpack.encode({name: value for name, value in values.items() if value is not None}))
    world.say(b"a", Generate("r", "abc", None, None, raw, resume_ids=resume_ids))
    if world.work:
        world.tokenize()


def test_what_the_client_has_goes_to_the_scheduler(world: World) -> None:
    resume = [pack_ids([5, 6]), None, b""]
    again(world, resume)
    [added] = world.added()
    assert added.resume_ids == resume
    [accepted] = world.got(b"a", Accepted)
    assert accepted.sampling.seed == 1
    request = world.manager.requests.by_uid(added.uid)
    assert request is not None
    assert request.open == {0, 2}
    assert request.tokens == [2, 0, 0]
    assert world.manager.requests.by_uid(added.uid + 1) is None
    world.manager.abort_all(None)
    ends = world.got(b"a", Chunk)
    assert [(chunk.index, chunk.first, chunk.usage.completion_tokens) for chunk in ends] == [(0, 2, 2), (2, 0, 0)]
    assert len(world.manager.requests) == 0


def test_an_abort_before_it_is_tokenized_ends_every_sample(world: World) -> None:
    raw = msgspec.Raw(msgspec.msgpack.encode({"n": 2, "seed": 1}))
    world.say(b"a", Generate("r", "abc", None, None, raw, resume_ids=[b"", None]))
    world.say(b"a", Abort("r"))
    assert {chunk.index for chunk in world.got(b"a", Chunk)} == {0, 1}


@pytest.mark.parametrize(
    ("resume", "sampling", "says"),
    [
        ([b"", b""], {"n": 3}, "must have 3 entries"),
        ([None, None], {}, "not None"),
        ([], {"n": 1}, "must have 1 entries"),
        ([b"abc"], {}, "4 bytes each"),
        ([pack_ids([-1])], {}, "outside the vocabulary"),
        ([pack_ids([2**30])], {}, "outside the vocabulary"),
        ([pack_ids([5] * 10)], {}, "nothing is left"),
        ([pack_ids([5, 7])], {"stop_token_ids": [7]}, "ends the output"),
        ([b""], {"seed": None}, "seed"),
    ],
)
def test_what_could_not_have_come_is_refused(
    world: World, resume: list[bytes | None], sampling: dict[str, Any], says: str
) -> None:
    again(world, resume, **sampling)
    [refused] = world.got(b"a", Refused)
    assert refused.error.field == "resume_ids"
    assert says in refused.error.message
    assert world.added() == []


def test_the_handshake_tells_what_the_engine_takes(world: World, spec: PipelineSpec) -> None:
    [welcome] = world.got(b"a", Welcome)
    assert welcome.capacity == spec.args.max_running_requests + spec.args.max_queued_requests


def test_the_engines_own_program_may_be_silent_and_slow(world: World) -> None:
    """Ctrl-Z, a debugger: it finds everything there afterwards. Others may not."""
    world.say(b"own", Hello(PROTOCOL, pid=os.getppid()))
    world.say(b"other", Hello(PROTOCOL, pid=os.getppid() + 1))
    for identity in (b"own", b"other"):
        world.generate(identity, "r")
        world.tokenize()
    own, other = world.added()
    world.socket.state = {b"own": Sent.FULL, b"other": Sent.FULL}
    for step in range(60):
        world.chunk(own, step)
        world.tick(1.0)
    assert world.aborted() == [other.uid]
    world.socket.state = {}
    world.tick()
    pieces = world.got(b"own", Chunk)
    assert "".join(piece.text for piece in pieces) == "x" * 60
    assert world.sessions.find(b"other") is None


@pytest.mark.parametrize("pages", [3, 1000])
def test_none_is_what_context_and_pool_allow(world: World, spec: PipelineSpec, pages: int) -> None:
    """The pool's size is asked for once, by who needs it."""
    for rid in ("1", "2"):
        world.generate(b"a", rid, max_new_tokens=None)
    world.generate(b"a", "3", max_new_tokens=5)
    assert len(world.work) == 1
    [query] = [message for message in world.to_scheduler if isinstance(message, SchedulerQuery)]
    world.manager.on_engine(SchedulerReply(query.qid, {"kv_pages_total": pages}))
    while world.work:
        world.tokenize()
    world.generate(b"a", "4", max_new_tokens=None)
    world.tokenize()
    assert sum(isinstance(message, SchedulerQuery) for message in world.to_scheduler) == 1
    by_rid = {added.rid: added for added in world.added()}
    prompt = len(by_rid["1"].token_ids) // 4
    most = min(spec.context_length - prompt, pages * spec.page_size - prompt + 1)
    assert [by_rid[rid].sampling.max_new_tokens for rid in "1234"] == [most, most, 5, most]


def test_a_request_that_waits_for_the_pools_size_can_end(world: World) -> None:
    world.generate(b"a", "1", max_new_tokens=None)
    world.say(b"a", Abort("1"))
    [chunk] = world.got(b"a", Chunk)
    assert chunk.finish.reason == "abort"
    world.manager.on_engine(SchedulerReply(0, {"kv_pages_total": 10}))
    while world.work:
        world.tokenize()
    assert world.added() == []


def test_the_pools_size_is_asked_for_again_when_the_scheduler_is_lost(world: World) -> None:
    world.generate(b"a", "1", max_new_tokens=None)
    world.manager.end_all(Finish("error", error=ErrorInfo("engine_lost", "the scheduler was killed")))
    world.generate(b"a", "1", max_new_tokens=None)  # as its client sends it again
    assert sum(isinstance(message, SchedulerQuery) for message in world.to_scheduler) == 2
