"""What can go wrong, one function each: what callers do, what others do to the engine, what happens to its processes.

An action takes a number from which it chooses (which stream, which process), so that a script of actions is a list of
names and numbers.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import psutil
import zmq

from tests.chaos.asks import Answer, Ask
from tests.chaos.traffic import Stream
from tests.integration.attacks import Bare
from tests.integration.daemon import Daemon, wait_until
from vibe_sgl_lite import Client
from vibe_sgl_lite.runtime.messages import PROTOCOL, Generate, Hello

FROZEN_S = (0.2, 0.5, 1.0, 2.0)
FLOOD = 100  # requests
DEADLY = frozenset({"kill", "crash", "starve", "fill_disk"})


@dataclass
class World:
    """The engine and who uses it. streams: of the current round."""

    daemon: Daemon
    clients: Sequence[Client]
    asks: Sequence[Ask]
    answers: Sequence[Answer]
    streams: list[Stream] = field(default_factory=list)

    def victim(self, pick: int) -> psutil.Process | None:
        """One of the engine's processes; of a spare one too. None if it dies just now."""
        children = self.daemon.children()
        names = sorted(children)
        return children[names[pick % len(names)]] if names else None

    def stream(self, pick: int) -> Stream | None:
        running = [stream for stream in self.streams if stream.is_alive()]
        return running[pick % len(running)] if running else None


def submit(world: World, pick: int) -> None:
    """A request; each number is another kind."""
    number = pick % len(world.asks)
    pair = world.asks[number], world.answers[number]
    stream = Stream(world.clients[pick % len(world.clients)], [pair])
    world.streams.append(stream)
    stream.start()


def flow(world: World, pick: int) -> None:
    """Wait until every stream has had a token, or has ended."""
    wait_until(lambda: all(s.arrivals or not s.is_alive() for s in world.streams), 60, "tokens of every stream")


def cancel(world: World, pick: int) -> None:
    stream = world.stream(pick)
    if stream is not None:
        stream.cancel()


def leave(world: World, pick: int) -> None:
    stream = world.stream(pick)
    if stream is not None:
        stream.leave()


def stop_reading(world: World, pick: int) -> None:
    """Until the end of the round."""
    stream = world.stream(pick)
    if stream is not None:
        stream.reading.clear()


def kill(world: World, pick: int) -> None:
    _send(world.victim(pick), signal.SIGKILL)


def crash(world: World, pick: int) -> None:
    _send(world.victim(pick), signal.SIGSEGV)


def freeze(world: World, pick: int) -> None:
    """Stop a process, or the launcher, and let it go on."""
    process = psutil.Process(world.daemon.process.pid) if pick % 6 == 5 else world.victim(pick)
    _send(process, signal.SIGSTOP)
    time.sleep(FROZEN_S[pick // 6 % len(FROZEN_S)])
    _send(process, signal.SIGCONT)


def starve(world: World, pick: int) -> None:
    """A process gets no more memory from the system than it has. The tokenizer manager would refuse what is new."""
    children = world.daemon.children()
    names = sorted(children.keys() - {"tokenizer_manager"})
    if names:
        process = children[names[pick % len(names)]]
        with contextlib.suppress(psutil.NoSuchProcess):
            size = process.memory_info().vms
            process.rlimit(psutil.RLIMIT_AS, (size, size))


def fill_disk(world: World, pick: int) -> None:
    """The launcher cannot write a byte to any file while a process dies, and for half a second."""
    launcher = psutil.Process(world.daemon.process.pid)
    launcher.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    kill(world, pick)
    time.sleep(0.5)
    launcher.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def vanish(world: World, pick: int) -> None:
    """A client that asks for much and is gone without a word."""
    with _stranger(world) as stranger:
        stranger.say(_generate("vanish", 4000))
        time.sleep(0.05)


def flood(world: World, pick: int) -> None:
    with _stranger(world) as stranger:
        for number in range(FLOOD):
            stranger.say(_generate(f"flood-{number}", 4))


def garbage(world: World, pick: int) -> None:
    """Random frames of a client, and random bytes of something that is none."""
    draw = random.Random(pick)
    with _stranger(world) as stranger:
        for _ in range(20):
            stranger.socket.send(draw.randbytes(draw.randrange(200)))
    with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):
        line.connect(world.daemon.address.removeprefix("ipc://"))
        line.send(draw.randbytes(300))


# How often each is drawn, in comparison.
ACTIONS: dict[str, tuple[int, Callable[[World, int], None]]] = {
    "submit": (40, submit),
    "flow": (2, flow),
    "cancel": (5, cancel),
    "leave": (5, leave),
    "stop_reading": (4, stop_reading),
    "vanish": (3, vanish),
    "flood": (2, flood),
    "garbage": (3, garbage),
    "kill": (8, kill),
    "crash": (3, crash),
    "freeze": (4, freeze),
    "starve": (2, starve),
    "fill_disk": (2, fill_disk),
}


def _send(process: psutil.Process | None, number: signal.Signals) -> None:
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _generate(rid: str, tokens: int) -> Generate:
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return Generate(rid, "Once", None, None, msgspec.Raw(msgspec.msgpack.encode(sampling)))


@contextmanager
def _stranger(world: World) -> Iterator[Bare]:
    """A client over a bare socket, which leaves without waiting for anything."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = Bare(context, world.daemon.address)
    stranger.say(Hello(PROTOCOL))
    yield stranger
    context.destroy(linger=100)
