"""What one client can send to harm another: `python -m tests.integration.attacks NAME ADDRESS`, a process of its own.

Speaks the protocol over a bare socket where the client library would refuse. Prints one line when it has had answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Accepted,
    Chunk,
    Chunks,
    Generate,
    Goodbye,
    Hello,
    Ping,
    Refused,
    ServerMessage,
)

NOTHING = msgspec.Raw(b"\x80")
_decode = msgspec.msgpack.Decoder(ServerMessage).decode


class Bare:
    """A client without the library's manners."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 2000)
        self.socket.connect(address)
        self.last_refusal = 0.0

    def say(self, message: Any) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def wait(self, count: int, within_s: float = 60.0, samples: int = 1) -> list[Refused | Chunk]:
        """Until so many samples have ended, of requests of so many `samples` each; how. Stays alive meanwhile."""
        found: list[Refused | Chunk] = []
        deadline, ping_at = time.monotonic() + within_s, 0.0
        ended = 0
        while ended < count and time.monotonic() < deadline:
            if time.monotonic() > ping_at:
                self.say(Ping())
                ping_at = time.monotonic() + 0.3
            if self.socket.poll(300):
                message = _decode(self.socket.recv())
                for part in message.chunks if isinstance(message, Chunks) else [message]:
                    self.last_refusal = time.monotonic() if isinstance(part, Refused) else self.last_refusal
                    if isinstance(part, Refused) or (isinstance(part, Chunk) and part.finish is not None):
                        found.append(part)
                        ended += samples if isinstance(part, Refused) else 1
        return found

    def ends(self, count: int, within_s: float = 60.0) -> list[Refused]:
        """The first `count` refusals; stays alive meanwhile."""
        found: list[Refused] = []
        deadline = time.monotonic() + within_s
        while len(found) < count and time.monotonic() < deadline:
            self.say(Ping())
            if self.socket.poll(300):
                message = _decode(self.socket.recv())
                assert not isinstance(message, Accepted), message.rid
                if isinstance(message, Refused):
                    found.append(message)
        return found


@contextmanager
def bare(address: str, hello: bool = True) -> Iterator[Bare]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Bare(context, address)
    if hello:
        client.say(Hello(PROTOCOL))
        client.socket.recv()
    yield client
    client.socket.close()
    context.term()


def request(rid: str, **fields: Any) -> Generate:
    return Generate(**{"rid": rid, "prompt": None, "input_ids": None, "messages": None, "sampling": NOTHING} | fields)


def chain(length: int) -> str:
    steps = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{length}": {"type": "string"}}})


def grammars(address: str) -> str:
    """Each is one kind of schema or expression that ended the engine or stalled it."""
    many = msgspec.Raw(msgspec.msgpack.encode({"n": 64}))
    hard: list[dict[str, Any]] = [
        {"json_schema": chain(2500)},
        {"json_schema": '{"anyOf": [' * 1500 + "{}" + "]}" * 1500},
        {"json_schema": '{"allOf": [' * 1500 + "{}" + "]}" * 1500},
        {"regex": ".*" * 8000},
        *[{"regex": "a?" * 3000 + "a" * 3000, "sampling": many}] * 4,
    ]
    with bare(address) as client:
        for number, fields in enumerate(hard):
            client.say(request(f"r{number}", prompt="x", **fields))
        return ",".join(sorted(str(refused.error.field) for refused in client.ends(len(hard))))


def slow_grammars(address: str) -> str:
    """What passes the trial but is slow: each is compiled anew on the ranks, and then followed by 16 samples."""
    samples = msgspec.Raw(msgspec.msgpack.encode({"n": 16, "max_new_tokens": 8}))
    with bare(address) as client:
        for number in range(12):
            regex = "a?" * (60 + number) + "[a-z]*" * (20 + number)
            client.say(request(f"r{number}", prompt="x", regex=regex, sampling=samples))
        refused = sum(isinstance(end, Refused) for end in client.wait(16 * 12, samples=16))
        return "done" if refused < 12 else "refused"


def empty_lists(address: str) -> str:
    message = {"role": "user", "content": "c", "more": [[]] * 1_480_000}
    frame = msgspec.msgpack.encode(request("r", messages=[message]))
    with bare(address) as client:
        for _ in range(16):
            client.socket.send(frame)
        return str(len(client.ends(16)))


def connections(address: str) -> str:
    """Of 1,000 that ask, only as many stay as there are descriptors for."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 1100)
    clients = [Bare(context, address) for _ in range(1000)]
    time.sleep(1.0)
    for client in clients:
        client.socket.setsockopt(zmq.LINGER, 0)
        client.say(Hello(PROTOCOL))
    deadline = time.monotonic() + 1.5
    welcome = sum(bool(client.socket.poll(max(0, int(1000 * (deadline - time.monotonic()))))) for client in clients)
    for client in clients:
        client.socket.close()
    context.term()
    return "some" if 400 < welcome < 1000 else str(welcome)


def long_prompts(address: str) -> str:
    text = "The quick brown fox jumps over the lazy dog. " * 11_000
    with bare(address) as client:
        for number in range(300):
            client.say(request(f"r{number}", prompt=text))
        client.say(Goodbye())
    return "left"


def many_prompts(address: str) -> str:
    """They take long; others' requests come in between."""
    text = "The quick brown fox jumps over the lazy dog. " * 300
    once = msgspec.Raw(msgspec.msgpack.encode({"max_new_tokens": 1}))
    with bare(address) as client:
        for number in range(40):
            client.say(request(f"r{number}", prompt=f"{number} {text}", sampling=once))
        refused = [end for end in client.wait(40, 8.0) if isinstance(end, Refused)]
        client.say(Goodbye())
        return "taken" if not refused else refused[0].error.message


def flood(address: str) -> str:
    """10,000 requests at once: those beyond what may wait are refused."""
    short = msgspec.Raw(msgspec.msgpack.encode({"max_new_tokens": 4}))
    frames = [msgspec.msgpack.encode(request(f"r{number}", prompt="x", sampling=short)) for number in range(10_000)]
    refused, last = 0, 0.0
    with bare(address) as client:
        client.socket.setsockopt(zmq.SNDHWM, 0)
        began = time.monotonic()
        for frame in frames:
            client.socket.send(frame)
        for end in client.wait(10_000, 100.0):
            if isinstance(end, Refused):
                refused += 1
        last = client.last_refusal - began
    sys.stderr.write(f"{refused} refused, the last after {last:.2f} s\n")
    return "some" if 1000 < refused < 9900 else str(refused)


def nothing(address: str) -> str:
    """To compare with."""
    time.sleep(5)
    return "nothing"


def long_names(address: str) -> str:
    frame = msgspec.msgpack.encode(request("r" * 15_000_000, prompt="x"))
    with bare(address, hello=False) as client:
        for _ in range(100):
            client.socket.send(frame)
        sizes = [len(client.socket.recv()) for _ in range(100)]
    return "short" if max(sizes) < 1000 else str(max(sizes))


ATTACKS: dict[str, Callable[[str], str]] = {
    attack.__name__: attack
    for attack in (
        nothing,
        grammars,
        slow_grammars,
        empty_lists,
        connections,
        long_prompts,
        many_prompts,
        long_names,
        flood,
    )
}

if __name__ == "__main__":
    sys.stdout.write(ATTACKS[sys.argv[1]](sys.argv[2]))
