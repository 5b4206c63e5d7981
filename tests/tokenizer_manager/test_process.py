"""The real tokenizer manager and detokenizer processes over real sockets, against a scheduler that echoes."""

import time
from typing import Any

import msgspec
import pytest

from tests.detokenizer.corpus import CORPUS, small_tokenizer
from tests.tokenizer_manager.harness import CONTEXT, VOCAB, TextSide, stats
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Accepted,
    ChildReady,
    Chunk,
    ErrorInfo,
    Generate,
    Hello,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    StopMatched,
    Usage,
    encode_request,
    pack_ids,
    unpack_ids,
)

TOKENIZER = small_tokenizer()


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
