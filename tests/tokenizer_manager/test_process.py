"""The real tokenizer manager and detokenizer processes over real sockets, against a scheduler that echoes."""

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from tests.detokenizer.corpus import CORPUS, small_tokenizer
from tests.tokenizer_manager.harness import CONTEXT, VOCAB, RawClient, TextSide, text_side
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    AbortAll,
    AbortRequest,
    Accepted,
    ChildReady,
    Chunk,
    Drain,
    ErrorInfo,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    Shutdown,
    StopMatched,
    Usage,
    Welcome,
    encode_request,
    pack_ids,
    unpack_ids,
)

TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def shared() -> Iterator[TextSide]:
    with text_side() as side:
        yield side


@pytest.fixture
def side(shared: TextSide) -> Iterator[TextSide]:
    """Nothing is left over for the next test: the processes are one test's as long as it runs."""
    yield shared
    scheduler = shared.scheduler
    scheduler.hold = scheduler.mute = False
    scheduler.reject = scheduler.flush_error = None
    scheduler.repeat, scheduler.pause_s = 1, 0.0
    for client in shared._clients:
        if not client.socket.closed:
            client.send(Goodbye())
            client.socket.close(linger=500)
    shared._clients.clear()
    scheduler.heard.clear()


def stats(client: RawClient) -> dict[str, Any]:
    client.send(Query(1, "stats"))
    while True:
        reply = client.receive()
        if isinstance(reply, QueryReply):
            assert reply.error is None
            return reply.values


# ------------------------------------------------------------------------------------------------------- main path


def test_handshake(side: TextSide) -> None:
    [ready] = [m for m in side.launcher.wait_for(ChildReady, 2) if m.name == "tokenizer_manager"]
    assert ready.facts == {"address": side.spec.endpoints.api}
    welcome = side.client().welcome
    assert welcome is not None
    assert (welcome.protocol, welcome.epoch, welcome.model.name) == (PROTOCOL, "e1", "small")
    assert (welcome.model.context_length, welcome.model.vocab_size) == (CONTEXT, VOCAB)
    other = side.client().welcome
    assert other is not None
    assert other.session != welcome.session


def test_wrong_protocol(side: TextSide) -> None:
    client = side.client(hello=False)
    client.send(Hello(PROTOCOL + 1))
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert (reply.error.code, reply.rid) == ("protocol", None)
    assert str(PROTOCOL + 1) in reply.error.message
    client.send(Ping())  # and there is no session
    assert isinstance(client.receive(), Refused)


@pytest.mark.parametrize("script", CORPUS)
def test_text_in_text_out(side: TextSide, script: str) -> None:
    client = side.client()
    ids = TOKENIZER.encode(CORPUS[script])
    client.generate("r", CORPUS[script], sampling={"max_new_tokens": 500, "seed": 5}, cache_salt="s", priority=3)
    accepted = client.receive()
    assert isinstance(accepted, Accepted)
    assert (accepted.rid, accepted.prompt_tokens) == ("r", len(ids))
    assert (accepted.sampling.temperature, accepted.sampling.top_k, accepted.sampling.seed) == (0.6, 20, 5)
    assert accepted.sampling.end_token_ids == (2, 0)
    chunks = client.finish("r")
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(ids)
    assert [i for chunk in chunks for i in unpack_ids(chunk.token_ids)] == ids
    assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == Usage(len(ids), len(ids), 1)
    added = side.scheduler.added("r")
    assert (added.cache_salt, added.priority, added.sampling) == ("s", 3, accepted.sampling)


def test_chat(side: TextSide) -> None:
    client = side.client()
    messages = [{"role": "user", "content": "<é> 你好"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    kwargs = {"tools": [{"name": "f"}], "enable_thinking": False, "unknown_but_off": False}
    client.generate("c", messages=messages, template_kwargs=kwargs)
    client.finish("c")
    text = (
        'T[{"name": "f"}]<|im_start|>user\n<é> 你好<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n'
        "<|im_start|>assistant\n<think>"
    )
    assert unpack_ids(side.scheduler.added("c").token_ids) == TOKENIZER.encode(text)


def test_token_ids(side: TextSide) -> None:
    client = side.client()
    client.generate("i", input_ids=pack_ids([5, 511, 6]), sampling={"skip_special_tokens": False})
    chunks = client.finish("i")
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode([5, 511, 6], skip_special_tokens=False)
    assert unpack_ids(side.scheduler.added("i").token_ids) == [5, 511, 6]


def test_stop_string(side: TextSide) -> None:
    client = side.client()
    client.generate("s", "hello world, and more", sampling={"stop": ["o w", "never"]})
    chunks = client.finish("s")
    assert "".join(chunk.text for chunk in chunks) == "hell"
    assert chunks[-1].finish is not None
    assert (chunks[-1].finish.reason, chunks[-1].finish.matched) == ("stop", "o w")
    uid = side.scheduler.added("s").uid
    side.scheduler.wait_for(StopMatched, lambda message: message.uid == uid)
    client.send(Ping(9))
    assert client.receive() == Pong(9)  # nothing comes behind the end


def test_many_streams_at_once(side: TextSide) -> None:
    """Three clients, 100 requests each; every one complete and in its own session, rids alike."""
    clients = [side.client() for _ in range(3)]
    texts = [f"{place} {text}" for place, text in enumerate(list(CORPUS.values()) * 7)][:100]
    for client in clients:
        for place, text in enumerate(texts):
            client.generate(f"r{place}", text, sampling={"max_new_tokens": 500})
    for client in clients:
        got = dict.fromkeys(range(len(texts)), "")
        ended: set[str] = set()
        while len(ended) < len(texts):
            message = client.receive()
            if isinstance(message, Chunk):
                assert message.rid not in ended
                got[int(message.rid[1:])] += message.text
                if message.finish is not None:
                    ended.add(message.rid)
        assert list(got.values()) == [TOKENIZER.decode(TOKENIZER.encode(text)) for text in texts]


@pytest.mark.parametrize("number", [2**64, -(2**70), 10**300])
def test_numbers_beyond_64_bits_anywhere_in_a_chat(side: TextSide, number: int) -> None:
    """In tools, in histories, as keys, and where nothing of the kind belongs."""
    user: dict[str, Any] = {"role": "user", "content": "x"}
    messages: list[Any]
    client = side.client()
    key = msgspec.msgpack.encode(msgspec.msgpack.Ext(1, str(number).encode()))  # our clients never send it so
    for messages, kwargs in (
        ([user], {"tools": [{"function": {"name": "f", "parameters": {"maximum": number}}}]}),
        ([user], {"tools": [{"KEY": [number]}]}),
        ([user | {"KEY": number}], {"KEY": number}),
        ([user, {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"a": number}}}]}], {}),
        ([user], {"colour": number}),
        ([{"role": number, "content": number}], {}),
    ):
        sampling = msgspec.Raw(msgspec.msgpack.encode({}))
        frame = encode_request(Generate("big", None, None, messages, sampling, template_kwargs=kwargs))
        client.socket.send(frame.replace(msgspec.msgpack.encode("KEY"), key))
        while not (isinstance(reply := client.receive(30), Refused) or (isinstance(reply, Chunk) and reply.finish)):
            pass
    client.generate("good", "fine")
    client.finish("good")


# ------------------------------------------------------------------------------------------------- refused requests

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


# ------------------------------------------------------------------------------------------------ aborts and losses


def test_abort(side: TextSide) -> None:
    side.scheduler.repeat, side.scheduler.pause_s = 10_000, 0.01
    client, other = side.client(), side.client()
    client.generate("r", "abc", sampling={"max_new_tokens": 1000})
    assert isinstance(client.receive(), Accepted)
    assert isinstance(client.receive(), Chunk)
    other.send(Abort("r"))  # not its request
    client.send(Abort("unknown"))
    assert isinstance(client.receive(), Chunk)
    client.send(Abort("r"))
    end = client.finish("r")[-1]
    assert end.finish is not None
    assert end.finish.reason == "abort"
    assert end.usage is not None
    assert end.usage.completion_tokens == end.first + len(end.token_ids) // 4


def test_goodbye_ends_requests(side: TextSide) -> None:
    side.scheduler.hold = True
    client = side.client()
    client.generate("r", "abc")
    uid = side.scheduler.added("r").uid
    client.send(Goodbye())
    side.scheduler.aborted(uid, 1.0)


def test_silent_client_is_dead_and_a_stranger_afterwards(side: TextSide) -> None:
    side.scheduler.hold = True
    client, other = side.client(), side.client()
    client.generate("r", "abc")
    other.generate("o", "abc")
    uid, other_uid = side.scheduler.added("r").uid, side.scheduler.added("o").uid
    start = time.monotonic()
    while not any(isinstance(m, AbortRequest) for m in side.scheduler.heard):
        other.send(Ping())
        time.sleep(0.1)
        assert time.monotonic() - start < 30
    assert time.monotonic() - start > 2.0
    side.scheduler.aborted(uid)
    assert not any(isinstance(m, AbortRequest) and m.uid == other_uid for m in side.scheduler.heard)
    assert isinstance(client.receive(), Accepted)
    client.send(Ping())
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert (reply.error.code, reply.rid) == ("protocol", None)
    client.generate("again", "abc")
    reply = client.receive()
    assert isinstance(reply, Refused)
    assert reply.rid == "again"
    client.send(Hello(PROTOCOL))
    assert isinstance(client.receive(), Welcome)


def test_vanished_client(side: TextSide) -> None:
    """While text flows, a closed connection is noticed at once, not after the silence."""
    side.scheduler.repeat, side.scheduler.pause_s = 10_000, 0.01
    client = side.client()
    client.generate("r", "abc", sampling={"max_new_tokens": 1000})
    uid = side.scheduler.added("r").uid
    client.receive()
    client.close()
    side.scheduler.aborted(uid, 1.0)


def test_slow_consumer_is_aborted_and_others_are_not() -> None:
    with text_side() as side:
        side.scheduler.repeat = 1000
        slow, good = side.client(hwm=1), side.client()
        prompt = "abcdefgh" * 400
        for number in range(8):
            slow.generate(f"s{number}", prompt, sampling={"max_new_tokens": 100})
        uids = [side.scheduler.added(f"s{number}").uid for number in range(8)]
        side.scheduler.repeat = 1
        good.generate("g", "hello there", sampling={"max_new_tokens": 100})
        deadline = time.monotonic() + 20
        while not any(isinstance(m, AbortRequest) for m in side.scheduler.heard) and time.monotonic() < deadline:
            slow.send(Ping())
            good.send(Ping())
            time.sleep(0.05)
        for uid in uids:
            side.scheduler.aborted(uid)
        assert "".join(chunk.text for chunk in good.finish("g")) == "hello there"
        # It was told, once each and without a gap, when it reads at last.
        received = dict.fromkeys((f"s{number}" for number in range(8)), 0)
        ended: list[str] = []
        while len(ended) < 8:
            message = slow.receive()
            if isinstance(message, Chunk):
                assert message.first == received[message.rid]
                received[message.rid] += len(message.token_ids) // 4
                if message.finish is not None:
                    assert message.finish.reason == "abort"
                    ended.append(message.rid)
        assert sorted(ended) == sorted(received)
        assert stats(good)["sessions_behind_total"] >= 1


# ------------------------------------------------------------------------------------------------------- questions


def test_queries(side: TextSide) -> None:
    client = side.client()
    values = stats(client)
    assert values["num_running"] == 0
    assert values["sessions"] >= 1
    client.send(Query(7, "health"))
    reply = client.receive()
    assert isinstance(reply, QueryReply)
    assert (reply.qid, reply.values["status"], reply.values["draining"]) == (7, "ok", False)
    side.scheduler.flush_error = ErrorInfo("invalid_request", "2 requests run")
    client.send(Query(8, "flush_cache"))
    assert client.receive() == QueryReply(8, {}, side.scheduler.flush_error)


def test_scheduler_does_not_answer(side: TextSide) -> None:
    side.scheduler.mute = True
    client = side.client()
    start = time.monotonic()
    for qid, what in ((1, "health"), (2, "stats"), (3, "flush_cache")):
        client.send(Query(qid, what))  # type: ignore[arg-type]
    replies = {m.qid: m for m in client.receive_for(2.6) if isinstance(m, QueryReply)}
    assert time.monotonic() - start > 2.0
    assert replies[1].values == {"status": "scheduler not answering", "draining": False}
    assert replies[1].error is None
    for qid in (2, 3):
        error = replies[qid].error
        assert error is not None
        assert "did not answer" in error.message


# ------------------------------------------------------------------------------------------------------ the launcher


def test_drain_then_shutdown() -> None:
    with text_side() as side:
        client = side.client()
        client.generate("r", "abc" * 20, sampling={"max_new_tokens": 100})
        side.scheduler.pause_s = 0.01
        assert isinstance(client.receive(), Accepted)
        side.launcher.tell("tokenizer_manager", Drain())
        time.sleep(0.1)
        client.generate("late", "abc")
        client.send(Query(1, "health"))
        messages = []
        while not (isinstance(message := client.receive(), Chunk) and message.finish is not None):
            messages.append(message)
        [refused] = [message for message in messages if isinstance(message, Refused)]
        assert (refused.rid, refused.error.code) == ("late", "draining")
        assert "draining" in refused.error.message
        [health] = [message for message in messages if isinstance(message, QueryReply)]
        assert (health.values["status"], health.values["draining"]) == ("draining", True)
        side.drained()
        side.launcher.tell("tokenizer_manager", Shutdown())
        goodbye = client.receive()
        assert isinstance(goodbye, Refused)
        assert (goodbye.error.code, goodbye.rid) == ("engine_dead", None)
        assert side.launcher.processes["tokenizer_manager"].wait(30) == 0
        side.launcher.tell("detokenizer", Shutdown())
        assert side.launcher.processes["detokenizer"].wait(30) == 0


@pytest.mark.parametrize("error", [None, ErrorInfo("engine_dead", "the worker died")])
def test_abort_all(error: ErrorInfo | None) -> None:
    with text_side() as side:
        side.scheduler.hold = True
        clients = [side.client() for _ in range(3)]
        for client in clients:
            for number in range(3):
                client.generate(f"r{number}", "abc")
                assert isinstance(client.receive(), Accepted)
        side.launcher.tell("tokenizer_manager", AbortAll(error))
        side.drained(1.0)
        for client in clients:
            ends = [client.receive() for _ in range(3)]
            assert {end.rid for end in ends if isinstance(end, Chunk)} == {"r0", "r1", "r2"}
            for end in ends:
                assert isinstance(end, Chunk)
                assert end.finish is not None
                assert (end.finish.reason, end.finish.error) == ("abort" if error is None else "error", error)
            client.send(Ping(4))
            assert client.receive() == Pong(4)  # nothing else came
            client.generate("late", "abc")
            refused = client.receive()
            assert isinstance(refused, Refused)
            assert refused.error.code == ("draining" if error is None else "engine_dead")


def test_drain_when_idle_and_heartbeats() -> None:
    with text_side() as side:
        side.launcher.tell("tokenizer_manager", Drain())
        side.drained(1.0)
        seen = len(side.launcher.wait_for(Heartbeat))
        side.launcher.wait_for(Heartbeat, seen + 6, timeout_s=3.0)  # two a second of each
        names = {message.name for message in side.launcher.heard if isinstance(message, Heartbeat)}
        assert names == {"tokenizer_manager", "detokenizer"}


# ---------------------------------------------------------------------------------------------------------- garbage


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
    assert stats(good)["bad_frames"] > before + 1000
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


# ------------------------------------------------------------------------------------------------------ the real client


def test_the_client_library(side: TextSide) -> None:
    from vibe_sgl_lite.runtime.client.client import Client
    from vibe_sgl_lite.runtime.errors import RequestError
    from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

    with Client(address=side.spec.endpoints.api) as client:
        outputs = client.generate(["hello", CORPUS["emoji"]], SamplingParams(max_new_tokens=300))
        assert [output.text for output in outputs] == ["hello", CORPUS["emoji"]]
        assert client.health()["status"] == "ok"
        with pytest.raises(RequestError, match="empty"):
            client.generate("")
