"""Clients that the manager finds gone, silent, or behind with reading."""

from __future__ import annotations

import pytest

from tests.tokenizer_manager.world import World
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, Finish, Ping, Refused, Usage, pack_ids
from vibe_sgl_lite.tokenizer_manager.sessions import Sent


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


def test_drain_waits_for_outboxes_but_not_for_the_dead(world: World) -> None:
    world.generate(b"a", "r")
    world.tokenize()
    world.socket.state[b"a"] = Sent.FULL
    world.manager.abort_all(None)
    assert not world.manager.take_drained()
    world.tick(0.6)
    assert world.manager.take_drained()
