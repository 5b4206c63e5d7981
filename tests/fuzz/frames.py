"""Mutated frames, bodies and headers, for every decoder that an untrusted peer reaches.

    python -m tests.fuzz.frames --count 1000000 --seed 0       in this process: nothing may raise
    python -m tests.fuzz.frames --live --count 1000000         over sockets to an engine, beside a client that streams

Each case is made from (seed, number), so that one that fails is run again alone: `--first 1234 --count 1`. What is
mutated: messages as clients send them, and `corpus.txt`, frames that are odd in themselves or once broke something.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.integration.daemon import Daemon
from tests.integration.harm import FLAGS, PROMPT, Bystander
from tests.tokenizer_manager.harness import make_spec
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.http_server.anthropic_messages import MessagesBody
from vibe_sgl_lite.http_server.bodies import BodyReader
from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.http_server.native import GenerateBody, TokenizeBody
from vibe_sgl_lite.http_server.openai_embeddings import EmbeddingsBody, RerankBody
from vibe_sgl_lite.http_server.openai_types import ChatBody, CompletionBody
from vibe_sgl_lite.runtime.errors import UserError, WeightsError
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    ChildMessage,
    DetokenizerInput,
    Finish,
    Generate,
    Goodbye,
    Hello,
    LauncherMessage,
    Ping,
    Query,
    RankInput,
    RankOutput,
    SchedulerInput,
    ServerMessage,
    TokenizerInput,
    pack_ids,
)
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.settings.safetensors_files import read_header
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.transport.channels import DECODE_ERRORS
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import CompilerArgs, GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.manager import TokenizerManager
from vibe_sgl_lite.tokenizer_manager.memory import MemoryWatch
from vibe_sgl_lite.tokenizer_manager.sessions import Sent, Sessions
from vibe_sgl_lite.tokenizer_manager.validate import Prepared

CORPUS = Path(__file__).with_name("corpus.txt")
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\0", "é" * 70, "x" * 300, b"", b"\x80", b"\xff\xff", b"abc", [], {}, [None], {"a": 1}, [[[]]], {"": {"": []}},
    msgspec.msgpack.Ext(1, b"9" * 30), msgspec.msgpack.Ext(1, b"x"), msgspec.msgpack.Ext(5, b""),
)  # fmt: skip
LONGEST_ANSWER = 8_000  # bytes: nothing long is echoed
FRAMES_A_CONNECTION = 2_000


def _request(rid: str, sampling: dict[str, Any] | None, **fields: Any) -> Generate:
    raw = msgspec.Raw(msgspec.msgpack.encode({} if sampling is None else {"max_new_tokens": 2, **sampling}))
    return Generate(**{"rid": rid, "prompt": None, "input_ids": None, "messages": None, "sampling": raw} | fields)


def _frames() -> list[Any]:
    """What clients send, as plain values."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = [
        Hello(PROTOCOL, "fuzz", 1),
        Ping(3),
        Abort("r1"),
        Query(1, "stats"),
        Query(2, "health"),
        Goodbye(),
        _request("r1", {}, prompt="Once upon a time"),
        _request("r2", {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["x", "yz"], "n": 2}, prompt="abc"),
        _request("r3", {"logprobs": True, "logit_bias": {5: 1.5}, "stop_token_ids": [7]}, input_ids=pack_ids([5, 6])),
        _request("r4", {"timeout_s": 1.0}, messages=chat, template_kwargs={"enable_thinking": False, "tools": [tool]}),
        _request("r5", {}, messages=[*chat, {"role": "assistant", "tool_calls": [call]}], max_thinking_tokens=3),
        _request("r6", {"seed": 3, "n": 2}, prompt="abc", resume_ids=[pack_ids([9]), None], priority=2, cache_salt="s"),
        _request("r7", {}, prompt="x", choice=["yes", "no"]),
        _request("r8", None, prompt="a cat", dimensions=8),
        _request("r9", None, pair=("Find it", "a cat", "The cat sat.")),
    ]
    values = [msgspec.msgpack.decode(msgspec.msgpack.encode(message)) for message in messages]
    return values + [msgspec.msgpack.decode(bytes.fromhex(line)) for line in _corpus("value")]


def _corpus(kind: str) -> list[str]:
    lines = (line.split() for line in CORPUS.read_text().splitlines() if line and not line.startswith("#"))
    return [words[1] for words in lines if words[0] == kind]


FRAMES = _frames()
RAW = [bytes.fromhex(line) for line in _corpus("raw")]
BODIES: list[tuple[type[msgspec.Struct], Any]] = [
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [], "stop": ["a"], "n": 1}),
    (CompletionBody, {"model": "m", "prompt": ["a", "b"], "logprobs": 2, "stream_options": {"include_usage": True}}),
    (MessagesBody, {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], "thinking": None}),
    (GenerateBody, {"text": "a", "sampling_params": {"max_new_tokens": 3}, "stream": True}),
    (TokenizeBody, {"prompt": "x"}),
    (EmbeddingsBody, {"model": "m", "input": ["a", "b"], "dimensions": 8, "encoding_format": "float"}),
    (RerankBody, {"model": "m", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
]
REFUSED: dict[str, tuple[object, ...]] = {"echo": (), "best_of": (1,), "unknown": ()}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


# ------------------------------------------------------------------------------------------------------------ mutations


def mutate_value(chance: random.Random, value: Any, depth: int = 0) -> Any:
    """A copy with one place of it changed."""
    if isinstance(value, list | dict) and value and depth < 8 and chance.random() < 0.85:
        changed: Any = list(value) if isinstance(value, list) else dict(value)
        key = chance.randrange(len(value)) if isinstance(value, list) else chance.choice(list(value))
        kind = chance.randrange(12)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(changed, list):
            changed.insert(key, chance.choice(ODD))
        elif kind == 1:
            changed[chance.choice(("x", "", "role", "content", "type", "n", "tools"))] = chance.choice(ODD)
        elif kind == 2 and isinstance(changed, list):
            changed[key:key] = [changed[key]] * chance.choice((1, 2, 40))
        else:
            changed[key] = mutate_value(chance, changed[key], depth + 1)
        return changed
    kind = chance.randrange(6)
    if kind == 0 and isinstance(value, str):
        return value * chance.choice((2, 100)) + chance.choice(("", "\0", "\u2028", "<|im_end|>", "\U0001f600"))
    if kind == 1 and isinstance(value, bytes):
        return mutate_bytes(chance, value)
    if kind == 2 and type(value) is int:
        return chance.choice((value + 1, -value, value * 1000, 2 ** chance.randrange(63)))
    if kind == 3:
        for _ in range(chance.choice((1, 5, 40, 600))):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value
    return chance.choice(ODD)


def mutate_bytes(chance: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place:place] = chance.randbytes(chance.choice((1, 2, 9)))
        elif kind == 2:
            del data[place : place + chance.choice((1, 3, 8))]
        elif kind == 3:
            data[place:place] = data[: chance.randrange(len(data) + 1)]
        elif place < len(data):
            data[place] = chance.choice(
                (0, 0x7F, 0x80, 0x90, 0xC1, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF, chance.randrange(256))
            )
    return bytes(data)


def make_frame(chance: random.Random) -> bytes:
    """One that a client might send."""
    kind = chance.random()
    if kind < 0.03:
        return chance.choice(RAW) if chance.random() < 0.5 else mutate_bytes(chance, chance.choice(RAW))
    value = chance.choice(FRAMES)
    if kind < 0.6:
        value = mutate_value(chance, value)
        if type(value) is list and len(value) > 5 and type(value[5]) is dict and chance.random() < 0.5:
            value[5] = mutate_value(chance, value[5])
    try:
        frame = msgspec.msgpack.encode(value)
    except (OverflowError, RecursionError, ValueError):
        return b""
    return mutate_bytes(chance, frame) if kind > 0.55 else frame


# -------------------------------------------------------------------------------------------------------------- targets


class Manager:
    """A tokenizer manager without processes, whose answers are measured and whose requests are tokenized at once."""

    def __init__(self, folder: Path) -> None:
        spec = make_spec(folder)
        self._now = 0.0
        self._work: list[tuple[Callable[[], Prepared], Callable[[Future[Prepared]], None]]] = []
        self._sessions = Sessions(self, self._now)  # type: ignore[arg-type]
        self._manager = TokenizerManager(
            spec,
            ChatTokenizer.from_folder(spec.tokenizer_folder),
            _NoGrammars(CompilerArgs("", 0, ())),
            self._sessions,
            lambda work, done: self._work.append((work, done)),
            lambda message: None,
            lambda: self._now,
            MemoryWatch(lambda: Limit(2.0**40, "a test")),
        )
        self.answers = 0

    def send(self, identity: bytes, frame: bytes) -> Sent:
        """As the socket."""
        assert len(frame) < LONGEST_ANSWER, f"an answer of {len(frame)} bytes"
        self.answers += 1
        return Sent.YES

    def take(self, chance: random.Random) -> None:
        identity = chance.choice((b"a", b"a", b"a", b"b", b"stranger"))
        if identity != b"stranger" and self._sessions.find(identity) is None:
            self._manager.on_frame(identity, msgspec.msgpack.encode(Hello(PROTOCOL)))
        self._manager.on_frame(identity, make_frame(chance))
        while self._work:
            work, done = self._work.pop()
            future: Future[Prepared] = Future()
            try:
                future.set_result(work())
            except UserError as error:
                future.set_exception(error)
            done(future)
        if len(self._manager.requests) > 100:
            self._manager.end_all(_ABORTED)
        self._now += 0.001
        self._manager.tick(self._now)


class _NoGrammars(GrammarCompiler):
    """The real one is a process of its own (tests/tokenizer_manager/test_grammar_compiler.py)."""

    def compile(self, source: Any) -> str:
        return "{}"


class Decoders:
    """What stands between the engine's processes, and what a client has of the engine."""

    def __init__(self) -> None:
        unions: tuple[Any, ...] = (
            TokenizerInput, SchedulerInput, DetokenizerInput, RankInput, RankOutput, ChildMessage, LauncherMessage,
            ServerMessage,
        )  # fmt: skip
        self._decoders = [msgspec.msgpack.Decoder(union) for union in unions]
        self._tags = [tag for union in unions for tag in (kind.__name__ for kind in union.__args__)]

    def take(self, chance: random.Random) -> None:
        value = mutate_value(chance, chance.choice(FRAMES))
        if isinstance(value, list) and value:
            value[0] = chance.choice(self._tags)
        try:
            frame = mutate_bytes(chance, msgspec.msgpack.encode(value))
        except (OverflowError, RecursionError):
            return
        for decoder in self._decoders:
            try:
                decoder.decode(frame)
            except DECODE_ERRORS:
                continue


class Bodies:
    def __init__(self) -> None:
        self._reader = BodyReader(Metrics())

    def take(self, chance: random.Random) -> None:
        kind, value = chance.choice(BODIES)
        value = mutate_value(chance, value)
        try:
            body = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
        except (TypeError, RecursionError):
            body = b'{"messages": ' + b"[" * 5000
        if chance.random() < 0.4:
            body = mutate_bytes(chance, body)
        try:
            self._reader.read(body, kind, REFUSED)
        except ApiError:
            return


class Headers:
    """Checkpoint files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.safetensors"

    def take(self, chance: random.Random) -> None:
        try:
            header = json.dumps(mutate_value(chance, HEADER)).encode()
        except (TypeError, RecursionError):
            header = b'{"a":' * 20_000
        if chance.random() < 0.4:
            header = mutate_bytes(chance, header)
        length = len(header) if chance.random() < 0.9 else chance.choice((0, 1, 2**62, len(header) + 9))
        self._path.write_bytes(length.to_bytes(8, "little") + header + bytes(24))
        refused = ""
        try:
            read_header(self._path)
        except WeightsError as error:
            refused = str(error)
        assert "\n" not in refused
        assert len(refused) < LONGEST_ANSWER


_ABORTED = Finish("abort")
SHARES = (("manager", 10), ("decoders", 6), ("bodies", 3), ("headers", 1))


def run(seed: int, first: int, count: int, seconds: float) -> Counter[str]:
    """How many cases each target had. AssertionError, or whatever was raised, with the case's number as a note."""
    done: Counter[str] = Counter()
    names = [name for name, share in SHARES for _ in range(share)]
    with tempfile.TemporaryDirectory(prefix="fz-", dir="/tmp") as folder:
        targets: dict[str, Any] = {
            "manager": Manager(Path(folder)), "decoders": Decoders(), "bodies": Bodies(),
            "headers": Headers(Path(folder)),
        }  # fmt: skip
        deadline = time.monotonic() + seconds
        for number in range(first, first + count):
            chance = random.Random(f"{seed}/{number}")
            name = chance.choice(names)
            try:
                targets[name].take(chance)
            except BaseException as error:
                error.add_note(f"seed {seed}, case {number}, {name}")
                raise
            done[name] += 1
            if number % 256 == 0 and time.monotonic() > deadline:
                break
    return done


# ----------------------------------------------------------------------------------------------------------------- live


class Peer:
    """One connection that sends frames, in one part or several, and throws away what comes back."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, hello: bool) -> None:
        self.sent = 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        if hello:
            self._socket.send(msgspec.msgpack.encode(Hello(PROTOCOL)))

    def send(self, chance: random.Random, frame: bytes) -> None:
        parts = [frame] if chance.random() < 0.98 else [frame] * chance.choice((2, 3))
        while True:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                break
            except zmq.Again:
                self._socket.poll(1000, zmq.POLLOUT | zmq.POLLIN)
                self.drain()
        self.sent += 1
        if self.sent % 64 == 0:
            self.drain()

    def drain(self) -> None:
        while True:
            try:
                self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return

    def close(self) -> None:
        self._socket.close(linger=0)


def run_live(seed: int, count: int, seconds: float, address: str) -> int:
    """Frames sent; from four connections at a time, which come and go."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peers: list[Peer] = []
    deadline = time.monotonic() + seconds
    number = 0
    while number < count and time.monotonic() < deadline:
        chance = random.Random(f"{seed}/{number}")
        while len(peers) < 4:
            peers.append(Peer(context, address, hello=chance.random() < 0.8))
        peer = chance.choice(peers)
        peer.send(chance, make_frame(chance))
        number += 1
        if peer.sent >= FRAMES_A_CONNECTION:
            peer.close()
            peers.remove(peer)
    for peer in peers:
        peer.drain()
        peer.close()
    context.term()
    return number


def live(seed: int, count: int, seconds: float) -> str:
    """Against an engine of its own. AssertionError when the bystander fails or a process of the engine dies."""
    with Daemon(*FLAGS) as daemon:
        daemon.wait_ready()
        before = daemon.children()
        with daemon.client() as client:
            params = SamplingParams(max_new_tokens=500, temperature=0, ignore_eos=True)
            expected = client.generate(PROMPT, params).token_ids
        bystander = Bystander(daemon)
        bystander.start()
        assert bystander.begun.wait(60)
        began = time.monotonic()
        sent = run_live(seed, count, seconds, daemon.address)
        took = time.monotonic() - began
        bystander.enough.set()
        bystander.join(60)
        assert bystander.failed is None, bystander.failed
        length = min(len(expected), len(bystander.tokens))
        assert length > 0
        assert bystander.tokens[:length] == expected[:length], "the bystander's tokens are others"
        after = daemon.children()  # a spare process may have been added
        assert all(after.get(name) == process for name, process in before.items()), daemon.log()
        assert "Traceback" not in daemon.log(), daemon.log()
        with daemon.client() as client:
            assert client.generate(PROMPT, params).token_ids == expected
            bad = client.stats()["bad_frames"]
        return (
            f"{sent} frames in {took:.0f} s, {bad} unreadable; the bystander's longest gap was "
            f"{bystander.longest_gap:.2f} s, its tokens are right"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--live", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if args.live:
        sys.stdout.write(live(args.seed, args.count, args.seconds) + "\n")
        return
    began = time.monotonic()
    done = run(args.seed, args.first, args.count, args.seconds)
    took = time.monotonic() - began
    sys.stdout.write(f"{sum(done.values())} cases in {took:.0f} s, nothing raised: {dict(done)}\n")


if __name__ == "__main__":
    main()
