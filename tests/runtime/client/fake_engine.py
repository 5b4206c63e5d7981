"""A tokenizer manager's outer face, played by a ROUTER socket in a thread: the oracle of the client tests.

A `script` decides what happens to each `Generate`; whatever arrives is recorded with its time and sender.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import zmq

from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Chunk,
    ClientMessage,
    ErrorInfo,
    Finish,
    Generate,
    Hello,
    ModelInfo,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    ServerMessage,
    Usage,
    Welcome,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, resolve

MODEL = ModelInfo(name="fake", context_length=1000, vocab_size=256)
STOP = Finish(reason="stop", matched=0)


def resolved(request: Generate) -> ResolvedSampling:
    params = msgspec.msgpack.decode(request.sampling, type=SamplingParams)
    return resolve(params, model_defaults={}, end_token_ids=(0,), prompt_tokens=3, context_length=1000, vocab_size=256)


def text_of(request: Generate) -> str:
    """What the fake model answers: its prompt reversed."""
    if request.prompt is not None:
        return request.prompt[::-1]
    if request.input_ids is not None:
        return "".join(chr(65 + i % 26) for i in unpack_ids(request.input_ids))
    assert request.messages is not None
    content: str = request.messages[-1]["content"]
    return content[::-1]


def accepted(request: Generate) -> Accepted:
    return Accepted(rid=request.rid, prompt_tokens=3, sampling=resolved(request))


def chunk(rid: str, first: int, text: str, finish: Finish | None = None) -> Chunk:
    """One token a character."""
    usage = None if finish is None else Usage(prompt_tokens=3, completion_tokens=first + len(text), cached_tokens=2)
    ids = pack_ids(ord(c) % 256 for c in text)
    return Chunk(rid=rid, index=0, first=first, token_ids=ids, text=text, finish=finish, usage=usage)


def answer(request: Generate) -> list[ServerMessage]:
    """Accepted, a chunk for each character, the last with the finish."""
    text = text_of(request)
    chunks = [chunk(request.rid, i, c, STOP if i == len(text) - 1 else None) for i, c in enumerate(text)]
    return [accepted(request), *chunks]


Script = Callable[[Generate], list[ServerMessage]]


class FakeEngine:
    def __init__(self, address: str, script: Script = answer) -> None:
        self.address = address
        self.script = script
        self.answers_pings = True
        self.answers_hellos = True
        self.capacity = 0
        self.values: dict[str, Any] = {"num_running": 0}
        self.query_error: ErrorInfo | None = None
        self.received: list[tuple[float, bytes, ClientMessage]] = []
        self._commands: SimpleQueue[Callable[[zmq.Socket[bytes]], None] | None] = SimpleQueue()
        self._ready = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 200)
        router.setsockopt(zmq.SNDHWM, 100_000)
        router.bind(self.address)
        self._ready.set()
        decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
        while True:
            try:
                while True:
                    command = self._commands.get_nowait()
                    if command is None:
                        router.close()
                        return
                    command(router)
            except Empty:
                pass
            while router.poll(5):
                identity, frame = router.recv_multipart()
                message = decoder.decode(frame)
                self.received.append((time.monotonic(), identity, message))
                for reply in self._replies(message):
                    router.send_multipart([identity, msgspec.msgpack.encode(reply)])

    def _replies(self, message: ClientMessage) -> list[ServerMessage]:
        match message:
            case Hello(protocol=protocol) if protocol != PROTOCOL:
                return [Refused(error=ErrorInfo(code="protocol", message=f"protocol {protocol}"))]
            case Hello() if self.answers_hellos:
                return [Welcome(protocol=PROTOCOL, session="s", epoch="e", model=MODEL, capacity=self.capacity)]
            case Ping(number=number) if self.answers_pings:
                return [Pong(number=number)]
            case Query(qid=qid):
                return [QueryReply(qid=qid, values=self.values, error=self.query_error)]
            case Generate():
                return self.script(message)
            case _:
                return []

    def lives(self) -> None:
        """Look as if a launcher were there, whatever becomes of this socket."""
        lock = Path(self.address.removeprefix("ipc://")).with_name("lock")
        if not lock.exists():  # never empty while a client looks: the launcher's stays, whatever it restarts
            lock.write_text(str(os.getpid()))

    def send(self, *messages: ServerMessage) -> None:
        """To the client that was heard last; returns when they are on their way."""
        identity = self.received[-1][1]
        sent = threading.Event()

        def send(router: zmq.Socket[bytes]) -> None:
            for message in messages:
                router.send_multipart([identity, msgspec.msgpack.encode(message)])
            sent.set()

        self._commands.put(send)
        assert sent.wait(30)

    def wait_for(self, kind: type[Any], count: int = 1, timeout_s: float = 30.0) -> list[Any]:
        """Messages of `kind` received, once there are `count`."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [message for _, _, message in list(self.received) if isinstance(message, kind)]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} of {count} {kind.__name__} came"
            time.sleep(0.005)

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(message, kind) for _, _, message in list(self.received))

    def aborted(self) -> list[str]:
        return [message.rid for _, _, message in list(self.received) if isinstance(message, Abort)]

    def close(self) -> None:
        """Gone, as an engine that was killed."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()
            self._context.destroy()


@contextmanager
def fake_engine(folder: Path, script: Script = answer) -> Iterator[FakeEngine]:
    engine = FakeEngine(f"ipc://{folder}/api.sock", script)
    try:
        yield engine
    finally:
        engine.close()


def silent(request: Generate) -> list[ServerMessage]:
    """Accepted, and then nothing."""
    return [accepted(request)]


def failing(code: str, text: str = "ab") -> Script:
    """`text`, then an error."""

    def script(request: Generate) -> list[ServerMessage]:
        finish = Finish(reason="error", error=ErrorInfo(code=code, message=f"because of {code}"))
        return [accepted(request), chunk(request.rid, 0, text, finish)]

    return script
