"""What the processes refuse, by name, and garbage that harms nobody."""

import random
import time
from typing import Any

import msgspec
import pytest
import zmq

from tests.tokenizer_manager.harness import CONTEXT, VOCAB, TextSide, stats, text_side
from vibe_sgl_lite.runtime.messages import Abort, Accepted, ErrorInfo, Ping, Query, Refused, pack_ids

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty": ({"prompt": ""}, "prompt", "empty"),
    "no ids": ({"input_ids": b""}, "prompt", "empty"),
    "two prompts": ({"prompt": "x", "input_ids": b"abcd"}, "prompt", "exactly one"),
    "no prompt": ({}, "prompt", "exactly one"),
    "negative id": ({"input_ids": pack_ids([1, -2])}, "input_ids", r"input_ids[1]=-2"),
    "high id": ({"input_ids": pack_ids([1, VOCAB])}, "input_ids", f"0..{VOCAB - 1}"),
    "half an id": ({"input_ids": b"abc"}, "input_ids", "int32"),
    "too long": ({"input_ids": pack_ids([1] * CONTEXT)}, "prompt", str(CONTEXT)),
    "too much asked": ({"prompt": "abc", "sampling": {"max_new_tokens": CONTEXT}}, "max_new_tokens", str(CONTEXT)),
    "out of range": ({"prompt": "x", "sampling": {"top_p": 2}}, "top_p", "top_p=2"),
    "unknown field": ({"prompt": "x", "sampling": {"topp": 2}}, "topp", "not a sampling parameter"),
    "wrong type": ({"prompt": "x", "sampling": {"stop": [1]}}, "stop", "must be a text"),
    "sampling no map": ({"prompt": "x", "sampling": [1]}, "sampling", "must be a map"),
    "too many samples": ({"prompt": "x", "sampling": {"n": 65}}, "n", "n=65"),
    "bad schema": ({"prompt": "x", "json_schema": '{"type": "thing"}'}, "json_schema", "Invalid type: thing"),
    "bad regex": ({"prompt": "x", "regex": "(a"}, "regex", "unclosed group"),
    "two grammars": ({"prompt": "x", "regex": "a", "choice": ["b"]}, "choice", "not regex and choice"),
    "grammar without an end": (
        {"prompt": "x", "regex": "a", "sampling": {"ignore_eos": True}}, "ignore_eos", "does not go with",
    ),
    "grammar and a minimum": (
        {"prompt": "x", "choice": ["a"], "sampling": {"min_new_tokens": 2}}, "min_new_tokens", "does not go with",
    ),
    "thinking without chat": ({"prompt": "x", "max_thinking_tokens": 3}, "max_thinking_tokens", "messages only"),
    "thinking without tags": (
        {"messages": [{"role": "user", "content": "x"}], "max_thinking_tokens": 3},
        "max_thinking_tokens", "no thinking block",
    ),
    "tools are no objects": (
        {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"tools": ["f"]}}, "tools", "list of",
    ),
    "long salt": ({"prompt": "x", "cache_salt": "s" * 300}, "cache_salt", "300"),
    "priority": ({"prompt": "x", "priority": 2**40}, "priority", "priority="),
    "kwargs without chat": ({"prompt": "x", "template_kwargs": {"tools": []}}, "template_kwargs", "messages only"),
    "no messages": ({"messages": []}, "messages", "0 entries"),
    "bad role": ({"messages": [{"role": "boss", "content": "x"}]}, "messages", "messages[0].role='boss'"),
    "no role": ({"messages": [{"content": "x"}]}, "messages", "role=None"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", "NoneType"),
    "content parts": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages", "only text is taken"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "messages", "must be a text"),
    "tool_calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": "f"}]}, "messages", "tool_calls must be",
    ),
    "deep": ({"messages": [{"role": "user", "content": "x", "a": eval("[" * 40 + "]" * 40)}]}, "messages", "deeper"),
    "unknown template variable": (
        {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"colour": 1}}, "colour", "not used",
    ),
    "reserved": (
        {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"chat_template": "x"}},
        "chat_template", "cannot be passed",
    ),
    "big tools": (
        {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"tools": ["x" * 300_000]}},
        "template_kwargs", "at most",
    ),
    "long rid": ({"rid": "r" * 300, "prompt": "x"}, "rid", "300"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_by_name(side: TextSide, name: str) -> None:
    fields, field, text = BAD[name]
    rid = fields.get("rid", "bad")
    client = side.client()
    client.generate(**{"rid": rid, "prompt": None} | fields)
    reply = client.receive()
    assert isinstance(reply, Refused)
    code = "context_length_exceeded" if str(CONTEXT) in text or "bytes of text" in text else "invalid_request"
    assert (reply.rid, reply.error.code, reply.error.field) == (rid[:256], code, field)
    assert text in reply.error.message
    client.generate("good", "fine")
    client.finish("good")
    assert len([m for m in side.scheduler.heard if getattr(m, "rid", None) == rid]) == 0


def test_wrong_types_are_answered_by_rid(side: TextSide) -> None:
    client = side.client()
    client.socket.send(msgspec.msgpack.encode(["Generate", "w", 17, None, None, {}, 0]))
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert (reply.rid, reply.error.field) == ("w", "prompt")
    client.socket.send(msgspec.msgpack.encode(["Generate", "v", "x", None]))
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert reply.rid == "v"


def test_ten_megabytes_of_text(side: TextSide) -> None:
    client = side.client()
    for number, fields in enumerate(
        [
            {"prompt": "word " * 2_000_000},
            {"messages": [{"role": "user", "content": "x" * 10_000_000}]},
            {"prompt": "x" * 70_000},  # over the limit of the text, not of the frame
            {"messages": [{"role": "user", "content": "x" * 35_000}] * 2},
        ]
    ):
        start = time.monotonic()
        client.generate(f"big{number}", **fields)  # type: ignore[arg-type]
        reply = client.receive()
        assert time.monotonic() - start < 10.0
        assert isinstance(reply, Refused)
        assert reply.rid == f"big{number}"
        assert "at most" in reply.error.message


def test_rid_in_flight(side: TextSide) -> None:
    side.scheduler.hold = True
    client, other = side.client(), side.client()
    client.generate("r", "abc")
    assert isinstance(client.receive(), Accepted)
    client.generate("r", "def")
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert (reply.rid, reply.error.field) == ("r", "rid")
    other.generate("r", "abc")  # in another session it is free
    assert isinstance(other.receive(), Accepted)
    client.send(Abort("r"))
    assert client.finish("r")[-1].finish is not None
    side.scheduler.hold = False
    client.generate("r", "abc")  # and here too, once the first has ended
    assert "".join(chunk.text for chunk in client.finish("r")) == "abc"


def test_the_scheduler_rejects(side: TextSide) -> None:
    side.scheduler.reject = ErrorInfo("kv_exhausted", "too large", "prompt")
    client = side.client()
    client.generate("r", "abc")
    assert isinstance(client.receive(), Accepted)
    assert client.receive() == Refused(side.scheduler.reject, "r")


def test_too_many_requests() -> None:
    """Refused at once beyond what may run and wait; 10,000 refusals take no second."""
    with text_side("tokenizer_manager", max_running_requests=4, max_queued_requests=6) as side:
        client = side.client()
        start = time.monotonic()
        for number in range(10_000):
            client.generate(f"r{number}", "abc")
        messages = [client.receive() for _ in range(10_000)]
        assert time.monotonic() - start < 30.0
        assert sum(isinstance(message, Accepted) for message in messages) == 10
        assert {message.error.code for message in messages if isinstance(message, Refused)} == {"overloaded"}


def test_garbage_harms_nobody(side: TextSide) -> None:
    """Random bytes, cut and altered messages, wrong part counts, oversize frames: from inside and outside a session."""
    chance = random.Random(3)
    good, bad, stranger = side.client(), side.client(), side.client(hello=False)
    before = stats(good)["bad_frames"]
    generate = msgspec.msgpack.encode(["Generate", "r", "hello", None, None, {"top_k": 3}, 0, None, None])
    seeds = [generate, *(msgspec.msgpack.encode(m) for m in (Ping(1), Query(1, "stats"), Abort("r")))]
    special = [
        b"", b"\xc1", b"\xff" * 100, b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode(["Generate", "deep"]) + b"\x91" * 100_000,
        b"\x98\xa8Generate\xa1r\xc0\xc0" + b"\x91" * 200_000,
        msgspec.msgpack.encode(["Hello", "not a number"]),
        msgspec.msgpack.encode(["Nobody", 1]),
        b"\x93\xa8Generate\xa2\xff\xfe\xa1x",  # not UTF-8
        b"\x92\xa5Abort\xa2\xff\xfe",
    ]  # fmt: skip
    for number in range(3000):
        frame = bytearray(chance.choice(seeds))
        kind = number % 3
        if kind == 0:
            frame = bytearray(chance.randbytes(chance.randint(0, 60)))
        elif kind == 1:
            del frame[chance.randint(0, len(frame)) :]
        else:
            for _ in range(chance.randint(1, 3)):
                frame[chance.randrange(len(frame))] = chance.randrange(256)
        for client in (bad, stranger):
            client.socket.send(bytes(frame))
    for odd in special:
        for client in (bad, stranger):
            client.socket.send(odd)
            client.socket.send_multipart([odd, odd])
    good.generate("g", "still here")
    assert "".join(chunk.text for chunk in good.finish("g")) == "still here"
    deadline = time.monotonic() + 30  # the others' frames may still be on their way
    while stats(good)["bad_frames"] <= before + 1000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    huge = side.client()
    huge.socket.send(b"x" * (17 * 1024 * 1024))  # ZeroMQ ends that connection
    good.generate("g2", "still here")
    assert "".join(chunk.text for chunk in good.finish("g2")) == "still here"


def test_garbage_on_the_inner_sockets(side: TextSide) -> None:
    context = side.launcher.context
    for address in (side.spec.endpoints.tokenizer_manager, side.spec.endpoints.detokenizer):
        socket = context.socket(zmq.PUSH)
        socket.connect(address)
        for frame in (b"", b"\xc1", b"\xff" * 50, msgspec.msgpack.encode(["ChunkBatch", 3])):
            socket.send(frame)
        socket.close(linger=500)
    client = side.client()
    client.generate("g", "still here")
    assert "".join(chunk.text for chunk in client.finish("g")) == "still here"
