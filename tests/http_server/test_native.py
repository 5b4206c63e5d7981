"""`/generate` and what goes with it, compared with our own client's answers of the same engine."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from typing import Any

import pytest

from tests.http_server.server import Reply, Server
from vibe_sgl_lite import SamplingParams

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
COLD = {"max_new_tokens": 8, "temperature": 0}


def test_texts_and_ids_in_text_and_ids_out(server: Server) -> None:
    with server.client() as ours:
        expected = ours.generate([PROMPT, "2 + 2 ="], GREEDY)
    one = server.post("/generate", {"text": PROMPT, "sampling_params": COLD}).json
    assert (one["text"], one["output_ids"]) == (expected[0].text, expected[0].token_ids)
    meta = one["meta_info"]
    assert expected[0].usage is not None
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (expected[0].usage.prompt_tokens, 8)
    ids = [server.post("/tokenize", {"prompt": text}).json["tokens"] for text in (PROMPT, "2 + 2 =")]
    for body in (
        {"text": [PROMPT, "2 + 2 ="], "sampling_params": COLD},
        {"input_ids": ids, "sampling_params": [COLD, COLD], "rid": ["a", "b"]},
    ):
        answers = server.post("/generate", body).json
        assert [answer["output_ids"] for answer in answers] == [output.token_ids for output in expected]
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]


def test_logprobs_as_trainers_read_them(server: Server) -> None:
    params = SamplingParams(max_new_tokens=4, temperature=0, top_logprobs=2, prompt_logprobs=True)
    with server.client() as ours:
        expected = ours.generate(PROMPT, params)
    assert expected.logprobs is not None
    assert expected.prompt_logprobs is not None
    body = {
        "text": PROMPT,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    meta = server.post("/generate", body).json["meta_info"]
    found = meta["output_token_logprobs"]
    assert [entry[1] for entry in found] == expected.token_ids
    assert [entry[0] for entry in found] == pytest.approx([entry.logprob for entry in expected.logprobs], abs=0.05)
    assert [len(tops) for tops in meta["output_top_logprobs"]] == [2] * 4
    assert meta["input_token_logprobs"][0] == [None, None, None]
    assert [entry[1] for entry in meta["input_token_logprobs"][1:]] == [
        entry.token_id for entry in expected.prompt_logprobs if entry
    ]


def test_a_stream_repeats_all_that_came(server: Server) -> None:
    with server.client() as ours:
        expected = ours.generate(PROMPT, GREEDY)
    events = server.post("/generate", {"text": PROMPT, "sampling_params": COLD, "stream": True}).events
    assert events[-1] == "[DONE]"
    assert (events[-2]["text"], events[-2]["output_ids"]) == (expected.text, expected.token_ids)
    assert all(later["text"].startswith(event["text"]) for event, later in itertools.pairwise(events[:-1]))
    assert events[0]["meta_info"]["finish_reason"] is None


def test_tokenize_and_detokenize(server: Server) -> None:
    text = "Grüße, 世界! <|im_end|>"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json["prompt"] == text
    assert (
        server.post("/detokenize", {"tokens": found["tokens"], "skip_special_tokens": True}).json["text"] == text[:-10]
    )
    chat = [{"role": "user", "content": "What is 17 + 25?"}]
    count = server.post("/tokenize", {"messages": chat}).json["count"]
    usage = server.post("/v1/chat/completions", {"messages": chat, "max_tokens": 1}).json["usage"]
    assert count == usage["prompt_tokens"]
    assert server.post("/detokenize", {"tokens": [10**6]}).json["error"]["param"] == "tokens"


def test_an_abort_answers_with_what_there_is(server: Server) -> None:
    replies: list[Any] = []
    body = {"text": PROMPT, "rid": "mine", "sampling_params": {"max_new_tokens": 20_000, "ignore_eos": True}}
    thread = threading.Thread(target=lambda: replies.append(server.post("/generate", body)))
    thread.start()
    while not server.stats()["num_running"]:
        pass
    assert server.post("/abort_request", {"rid": "nobody"}).status == 200
    assert thread.is_alive()
    assert server.post("/abort_request", {"rid": "mine"}).status == 200
    thread.join(10)
    assert replies[0].status == 200
    assert replies[0].json["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(replies[0].json["output_ids"]) == replies[0].json["meta_info"]["completion_tokens"] < 20_000


def test_a_cache_is_flushed_when_idle_and_not_before(server: Server) -> None:
    server.post("/generate", {"text": PROMPT * 20, "sampling_params": COLD})
    server.wait_idle()
    assert server.stats()["kv_pages_cached"] > 0
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    busy = {"prompt": PROMPT, "max_tokens": 5000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(busy), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read(10)
    refused = server.post("/flush_cache", b"")
    assert (refused.status, refused.json["error"]["code"]) == (400, "flush_refused")
    response.close()
    connection.close()
    server.wait_idle()
    assert server.post("/flush_cache", {}).json["flushed_pages"] > 0
    assert server.stats()["kv_pages_cached"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "x", "input_ids": [1]}, "text"),
        ({"text": "x", "sampling_params": {"ebnf": "x"}}, "ebnf"),
        ({"text": "x", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"text": "x", "image_data": "x"}, "image_data"),
        ({"text": "x", "logprob_start_len": 3}, "logprob_start_len"),
        ({"text": "x", "rid": ["a", "b"]}, "rid"),
    ],
    ids=str,
)
def test_what_is_refused(server: Server, body: dict[str, Any], param: str) -> None:
    reply: Reply = server.post("/generate", body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.data


def test_what_it_tells_of_itself(server: Server) -> None:
    info = server.get("/server_info").json
    assert info["server_args"]["page_size"] == 16
    assert info["max_total_num_tokens"] > 16
    assert server.get("/model_info").json["context_length"] == 32768
    assert server.get("/version").json["version"]
    assert server.get("/health").json == {"status": "ok"}
