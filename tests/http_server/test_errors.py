"""What is refused, how, and that the openai client raises the right thing of it."""

from __future__ import annotations

import http.client
import json
import re
import time
from typing import Any

import openai
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite.http_server.app import ELSEWHERE, ROUTES
from vibe_sgl_lite.http_server.bodies import BodyReader
from vibe_sgl_lite.http_server.errors import ApiError, from_engine
from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.http_server.openai_types import IGNORED, INSTEAD, REFUSED, ChatBody, CompletionBody
from vibe_sgl_lite.runtime.errors import KVExhaustedError

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"min_tokens": 30, "max_tokens": 20}, "min_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"best_of": 4}, "best_of"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"regex": "("}, "regex"),
        ({"regex": "a", "structured_outputs": {"regex": "b"}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "g"}},
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            "tool_choice",
        ),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"foo": 1}}, "foo"),
        ({"priority": 2**40}, "priority"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": []}, "continue_final_message"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(server: Server, extra: dict[str, object], param: str) -> None:
    for stream in (False, True):
        reply = server.post(CHAT, {"messages": QUESTION, "max_tokens": 5, "stream": stream} | extra)
        error = reply.json["error"]
        assert reply.status == 400, error
        assert error["param"] == param, error
        assert error["type"] == "invalid_request_error"
        assert error["code"]
        assert len(error["message"]) > 10


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"messages": "\\ud800"}', b"null"])
def test_a_body_that_is_no_object(server: Server, body: bytes) -> None:
    reply = server.post(CHAT, body)
    assert reply.status == 400
    assert reply.json["error"]["message"]


@pytest.mark.parametrize(
    "value", [b'"\xff"', b"1e999", b'"\\ud800"', b"[" * 2000 + b"]" * 2000], ids=lambda value: repr(value[:9])
)
def test_a_field_that_is_not_read_may_hold_anything(server: Server, value: bytes) -> None:
    for name in (b"suffix", b"anything"):
        body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "%b": %b}' % (name, value)
        reply = server.post(CHAT, body)
        assert reply.status in (200, 400), reply.data
        assert reply.status == 200 or reply.json["error"]["message"]


@pytest.mark.parametrize("name", ["messages", "self", "conversation", "tokenize", "allow_special_tokens", "foo"])
def test_template_variables_that_are_none_are_named(server: Server, name: str) -> None:
    """The same, however early the template is asked."""
    variables = {"chat_template_kwargs": {name: "x"}}
    for path, more in ((CHAT, {}), (CHAT, {"return_token_ids": True}), ("/tokenize", {})):
        reply = server.post(
            path, {"messages": QUESTION} | variables | ({"max_tokens": 1} if path == CHAT else {}) | more
        )
        assert (reply.status, reply.json["error"]["param"]) == (400, name), (path, more, reply.data)
        off = {"chat_template_kwargs": {"self": None, "foo": False}}  # what is off asks for nothing
        assert server.post(path, {"messages": QUESTION, "max_tokens": 1} | off | more).status == 200


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_a_name_from_elsewhere_is_refused_with_ours(name: str) -> None:
    """And values that ask for nothing are not."""
    reader = BodyReader(Metrics())
    wanted: dict[str, Any] = {"messages": QUESTION}
    with pytest.raises(ApiError, match=re.escape(f"{name} is not supported: use {INSTEAD[name]}")) as caught:
        reader.read(json.dumps(wanted | {name: 0.5}).encode(), ChatBody, REFUSED, IGNORED)
    assert caught.value.param == name
    for nothing in (None, *REFUSED[name]):
        reader.read(json.dumps(wanted | {name: nothing}).encode(), ChatBody, REFUSED, IGNORED)


def test_paths_of_other_engines_lead_to_paths_that_there_are() -> None:
    assert set(ELSEWHERE.values()) <= {path for _, path in ROUTES}
    assert not set(ELSEWHERE) & {path for _, path in ROUTES}


def test_what_to_use_instead_is_taken() -> None:
    taken = {
        *ChatBody.__struct_fields__,
        *CompletionBody.__struct_fields__,
        "or",
        "and",
        "fields",
        "of",
        "their",
        "own",
    }
    assert {word for text in INSTEAD.values() for word in text.split()} <= taken


def test_unknown_fields_are_taken_and_counted(server: Server) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "frobnicate": 3, "user": "me", "best_of": None, "functions": []}
    assert server.post(CHAT, body).status == 200
    assert server.post(CHAT, body).status == 200
    assert server.daemon.log().count("frobnicate") == 1
    page = server.get("/metrics").data.decode()
    assert 'vibe:http_unknown_fields_total{field="frobnicate"} 2.0' in page
    assert 'field="user"' not in page


def test_too_long_for_the_context(client: Any) -> None:
    long = [{"role": "user", "content": "again and " * 40_000}]
    for messages, tokens in ((long, 10), (QUESTION, 10**6)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param in ("messages", "max_tokens")


def test_too_long_for_the_kv_cache_is_an_overflow_too() -> None:
    """For a client it is the same: it must send less."""
    told = from_engine(KVExhaustedError("needs 9 KV pages"), CHAT)
    assert (told.status, told.code) == (400, "context_length_exceeded")
    assert str(told.anthropic()["error"]).count("prompt is too long: needs 9 KV pages") == 1


def test_unknown_models_paths_and_methods(server: Server, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert server.get("/v1/models/gpt-4").status == 404
    for path, told in (
        ("/nothing", "see /openapi.json"),
        ("/chat/completions", "it is /v1/chat/completions"),  # a base_url without /v1
        ("/v1/completions/", "it is /v1/completions"),
        ("/api/chat", "it is /v1/chat/completions"),
        ("/rerank", "it is /v1/rerank"),
    ):
        reply = server.post(path, {})
        assert (reply.status, reply.json["error"]["message"]) == (404, f"there is no {path} here; {told}")
    wrong = server.get(CHAT)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert server.post("/health", {}).status == 405


def test_the_model_list(client: Any) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "vibe-sgl-lite"


def test_a_body_over_the_limit(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    connection.putrequest("POST", CHAT)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(10**9))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "too_large"
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: Server, stream: bool) -> None:
    before = server.wait_idle()
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    body = {"prompt": "Once", "max_tokens": 30_000, "ignore_eos": True, "stream": stream, "n": 4}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    if stream:
        connection.getresponse().read(100)
    else:
        deadline = time.monotonic() + 30
        while not server.stats()["num_running"]:
            assert time.monotonic() < deadline
    assert connection.sock is not None or stream
    connection.close()
    began = time.monotonic()
    after = server.wait_idle()
    assert time.monotonic() - began < 10
    assert after["kv_pages_free"] + after["kv_pages_cached"] == after["kv_pages_total"]
    assert after["completion_tokens_total"] - before["completion_tokens_total"] < 30_000
