"""Outbox, line to the scheduler, start-up: the parts on their own."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.tokenizer_manager.harness import text_side
from vibe_sgl_lite.runtime.messages import (
    Abort,
    AbortRequest,
    Chunk,
    Finish,
    LogprobEntry,
    Ping,
    Usage,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.tokenizer_manager.outbox import Outbox
from vibe_sgl_lite.tokenizer_manager.process import SchedulerLine, _new_loop


def encoded(uid: int, first: int, size: int, finish: Finish | None = None, logprobs: bool = False) -> bytes:
    ids = list(range(first, first + size))
    entries = tuple(LogprobEntry(i, -1.0, str(i)) for i in ids) if logprobs else None
    usage = None if finish is None else Usage(1, first + size)
    text = "".join(f"{i}," for i in ids)
    return msgspec.msgpack.encode(Chunk(f"r{uid}", 0, first, pack_ids(ids), text, finish, usage, entries))


@pytest.mark.parametrize("seed", range(30))
def test_outbox_keeps_everything_in_order(seed: int) -> None:
    chance = random.Random(seed)
    outbox = Outbox()
    firsts = dict.fromkeys(range(4), 0)
    others: list[bytes] = []
    got: list[bytes] = []
    for step in range(400):
        if chance.random() < 0.2 and outbox:
            got.append(outbox.first())
            outbox.pop()
        elif chance.random() < 0.1:
            others.append(msgspec.msgpack.encode(Abort(str(step))))
            outbox.add(others[-1], float(step))
        else:
            uid, size = chance.randrange(4), chance.randint(0, 3)
            outbox.add_chunk(uid, encoded(uid, firsts[uid], size, logprobs=uid == 1), float(step))
            firsts[uid] += size
    for uid, first in firsts.items():
        outbox.add_chunk(uid, encoded(uid, first, 1, Finish("length"), logprobs=uid == 1), 400.0)
    sizes = []
    while outbox:
        sizes.append(outbox.num_bytes)
        got.append(outbox.first())
        outbox.pop()
    assert outbox.num_bytes == outbox.chunk_bytes == 0
    assert sorted(sizes, reverse=True) == sizes
    chunks = [msgspec.msgpack.decode(frame, type=Chunk) for frame in got if frame not in others]
    assert [frame for frame in got if frame in others] == others
    for uid, first in firsts.items():
        mine = [chunk for chunk in chunks if chunk.rid == f"r{uid}"]
        assert [i for chunk in mine for i in unpack_ids(chunk.token_ids)] == list(range(first + 1))
        assert "".join(chunk.text for chunk in mine) == "".join(f"{i}," for i in range(first + 1))
        assert (mine[-1].finish, mine[-1].usage) == (Finish("length"), Usage(1, first + 1))
        if uid == 1:
            assert [entry.token_id for chunk in mine for entry in chunk.logprobs or ()] == list(range(first + 1))


def test_outbox_age_is_that_of_the_oldest() -> None:
    outbox = Outbox()
    assert outbox.age(9.0) == 0.0
    outbox.add_chunk(1, encoded(1, 0, 1), 1.0)
    outbox.add(b"x", 2.0)
    outbox.add_chunk(1, encoded(1, 1, 1), 5.0)
    assert outbox.age(9.0) == 8.0
    outbox.pop()
    assert outbox.age(9.0) == 7.0


def test_line_to_a_scheduler_that_is_not_there_does_not_block(tmp_path: Path) -> None:
    """Everything is kept beyond ZeroMQ's own limit, and arrives in order when the scheduler comes up."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc:///tmp/vsl-line-{os.getpid()}"
    line = SchedulerLine(context, address)
    for uid in range(12_000):
        line.send(AbortRequest(uid))
    assert len(line) >= 2000
    receiver = context.socket(zmq.PULL)
    receiver.bind(address)
    got: list[int] = []
    while len(got) < 12_000:
        line.flush()
        assert receiver.poll(2000)
        got.append(msgspec.msgpack.decode(receiver.recv(), type=AbortRequest).uid)
    assert got == list(range(12_000))
    assert len(line) == 0
    for socket in (line.socket, receiver):
        socket.close(linger=0)
    context.destroy(linger=0)
    os.unlink(address.removeprefix("ipc://"))


@pytest.mark.parametrize("module", ["vibe_sgl_lite.tokenizer_manager.process", "vibe_sgl_lite.detokenizer.process"])
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'numpy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = _new_loop()
    assert type(loop).__module__.startswith("asyncio")
    assert isinstance(loop, asyncio.AbstractEventLoop)
    loop.close()


@pytest.mark.slow
def test_a_stopped_manager_does_not_take_its_clients_for_dead() -> None:
    with text_side("tokenizer_manager") as side:
        side.scheduler.hold = True
        client = side.client()
        client.generate("r", "abc")
        side.scheduler.added("r")
        process = side.launcher.processes["tokenizer_manager"]
        os.kill(process.pid, signal.SIGSTOP)
        try:
            for _ in range(16):
                client.send(Ping())
                time.sleep(0.2)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        client.receive_for(1.0)
        assert not any(isinstance(message, AbortRequest) for message in side.scheduler.heard)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    """Pings are answered while the largest text that is taken is tokenized (the lock is released meanwhile)."""
    with text_side("tokenizer_manager") as side:
        side.scheduler.hold = True
        client = side.client()
        for number in range(20):
            client.generate(f"r{number}", "hello world " * 5000)
        worst = 0.0
        for number in range(20):
            start = time.monotonic()
            client.send(Ping(number))
            client.socket.poll(2000)
            client.receive()
            worst = max(worst, time.monotonic() - start)
        assert worst < 0.5
