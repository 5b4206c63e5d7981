"""Pauses, new weights and sleep over HTTP, under SGLang's names and vLLM's. The engine is the other tests' too: each of
these leaves it as it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_server.server import Reply, Server
from vibe_sgl_lite import Client

FOLDER = str(Path(__file__).resolve().parent.parent.parent / "vibe_sgl_lite" / "models" / "tiny")
BODY = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
ENDLESS = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 20_000, "ignore_eos": True}}


@pytest.fixture(autouse=True)
def as_it_was(server: Server) -> Iterator[None]:
    yield
    with server.client() as client:
        client.wake_up()
        client.continue_generation()
        client.update_weights_from_disk(FOLDER, "default")


def begun(server: Server, body: Any) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(server.post("/generate", body)))
    thread.start()
    return thread, replies


def wait_for(server: Server, name: str, value: int) -> None:
    with server.client() as client:
        while client.stats()[name] != value:
            pass


def test_the_way_of_sglangs_trainers(server: Server) -> None:
    before = server.post("/generate", BODY).json
    assert before["meta_info"]["weight_version"] == "default"
    assert before["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 8}]
    thread, replies = begun(server, ENDLESS)
    wait_for(server, "num_running", 1)
    assert server.post("/pause_generation", {}).json["status"] == "ok"
    thread.join(30)
    meta = replies[0].json["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["completion_tokens"] == len(replies[0].json["output_ids"])
    assert server.get("/is_paused").json == {"is_paused": True}
    assert server.post("/flush_cache", {}).status == 200
    body = {"model_path": FOLDER, "weight_version": "7", "load_format": "auto", "flush_cache": True, "token_step": 3}
    updated = server.post("/update_weights_from_disk", body)
    assert updated.status == 200
    assert updated.json["success"] is True
    assert (updated.json["weight_version"], updated.json["num_paused_requests"]) == ("7", 0)
    assert server.post("/continue_generation", {}).status == 200
    after = server.post("/generate", BODY).json
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == "7"
    assert after["meta_info"]["cached_tokens"] == 0
    for path in ("/weight_version", "/get_weight_version", "/model_info", "/get_model_info"):
        assert server.get(path).json["weight_version"] == "7"


def test_a_kept_stream_tells_both_versions(server: Server) -> None:
    body = ENDLESS | {"stream": True, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
    thread, replies = begun(server, body)
    wait_for(server, "num_running", 1)
    assert server.post("/pause_generation", {"mode": "in_place"}).json["num_paused_requests"] == 1
    done = server.post("/update_weights_from_disk", {"model_path": FOLDER, "weight_version": "8"}).json
    assert done["num_paused_requests"] == 1
    server.post("/continue_generation", {})
    thread.join(60)
    last = replies[0].events[-2]
    spans = last["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans][-1] == last["meta_info"]["weight_version"] == "8"
    assert [span["start"] for span in spans] == [0, *[span["end"] for span in spans[:-1]]]
    assert spans[-1]["end"] == len(last["output_ids"]) == 300


def test_sleep_by_both_names(server: Server) -> None:
    before = server.post("/generate", BODY).json["output_ids"]
    for sleep, wake in (
        ("/sleep?level=1", "/wake_up"),
        ("/sleep?level=2&mode=wait", "/wake_up?tags=kv_cache&tags=weights"),
    ):
        assert server.post(sleep, b"").status == 200
        assert server.get("/is_sleeping").json == {"is_sleeping": True}
        assert server.get("/health").status == 200
        thread, replies = begun(server, BODY)
        wait_for(server, "num_waiting", 1)
        assert server.post(wake, b"").status == 200
        thread.join(30)
        assert replies[0].json["output_ids"] == before
    assert server.post("/release_memory_occupation", {"tags": ["kv_cache"]}).status == 200
    assert server.post("/release_memory_occupation", {}).status == 200
    assert server.post("/resume_memory_occupation", {"tags": ["weights"]}).status == 200  # they come with the cache
    assert server.get("/is_sleeping").json == {"is_sleeping": True}
    assert server.post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]}).status == 200
    assert server.get("/is_sleeping").json == {"is_sleeping": False}
    assert server.post("/generate", BODY).json["output_ids"] == before


def test_pause_and_resume_as_vllm_has_them(server: Server) -> None:
    assert server.post("/pause?mode=wait&clear_cache=false", b"").json == {"status": "paused"}
    assert server.post("/pause", b"").json == {"status": "paused"}
    assert server.post("/resume", b"").json == {"status": "resumed"}
    assert server.get("/is_paused").json == {"is_paused": False}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/pause_generation", {"mode": "stop"}, "mode"),
        ("/pause_generation", {"modus": "keep"}, "modus"),
        ("/continue_generation", {"x": 1}, "x"),
        ("/update_weights_from_disk", {}, None),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, "path"),
        ("/update_weights_from_disk", {"model_path": FOLDER, "load_format": "dummy"}, "load_format"),
        ("/update_weights_from_disk", {"model_path": FOLDER, "keep_pause": True}, "keep_pause"),
        ("/update_weights_from_disk", {"model_path": FOLDER, "flush_cache": False}, "flush_cache"),
        ("/update_weights_from_disk", {"model_path": FOLDER, "version": "7"}, "version"),
        ("/release_memory_occupation", {"tags": ["weights"]}, "tags"),
        ("/release_memory_occupation", {"tags": ["everything"]}, "tags"),
        ("/sleep?level=3", b"", "level"),
        ("/sleep?deep=1", b"", "deep"),
        ("/sleep?level=x", b"", None),
        ("/pause?mode=in_place", b"", None),
    ],
)
def test_what_is_not_understood_is_refused(server: Server, path: str, body: Any, param: str | None) -> None:
    reply = server.post(path, body)
    assert reply.status == 400, reply.data
    assert reply.json["error"]["param"] == param
    assert reply.json.get("success", False) is False
    assert server.get("/is_paused").json == {"is_paused": False}


def test_openai_answers_tell_the_version(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "Hi", "max_tokens": 2})):
        assert server.post(path, body).json["metadata"] == {"weight_version": "default"}
        ends = [event for event in server.post(path, body | {"stream": True}).events if "metadata" in event]
        assert [event["metadata"] for event in ends] == [{"weight_version": "default"}]
        assert json.dumps(ends[0]["choices"][0]["finish_reason"]) == '"length"'


def test_a_client_and_http_see_the_same_pause(server: Server) -> None:
    with server.client() as client:
        assert isinstance(client, Client)
        client.pause_generation("wait")
        assert server.get("/is_paused").json == {"is_paused": True}
        client.continue_generation()
        assert server.get("/is_paused").json == {"is_paused": False}
