"""The manager without processes: a socket, a clock, threads and a scheduler that the tests move by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    AbortRequest,
    AddRequest,
    Chunk,
    ChunkBatch,
    Chunks,
    Finish,
    Generate,
    Hello,
    RoutedChunk,
    SchedulerInput,
    ServerMessage,
    Usage,
    pack_ids,
)
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import CompilerArgs, GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.manager import TokenizerManager
from vibe_sgl_lite.tokenizer_manager.memory import MemoryWatch
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


def end_of(world: World, uid: int) -> bytes:
    request = world.manager.requests.by_uid(uid)
    assert request is not None
    tokens = request.tokens[0]
    return msgspec.msgpack.encode(Chunk(request.rid, 0, tokens, b"", "", Finish("length"), Usage(3, tokens)))
