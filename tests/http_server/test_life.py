"""One server from its first moment to its last: loading, serving, full, draining, gone."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from typing import Any

import msgspec
import openai
import pytest
import zmq

from tests.http_server.server import Reply, Server
from tests.integration.daemon import Daemon, wait_until

KEY = {"authorization": "Bearer x"}  # that of the openai client: one client with it, for whom the queue is full
BODY: dict[str, Any] = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_from_loading_to_gone() -> None:
    port, kv_port, replay_port = free_port(), free_port(), free_port()
    flags = ["--port", str(port), "--address", "tcp://127.0.0.1:0", "--max-running-requests", "1"]
    events: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    events.subscribe(b"kv@")
    events.connect(f"tcp://127.0.0.1:{kv_port}")
    replay = f"tcp://127.0.0.1:{replay_port}"
    flags += ["--max-queued-requests", "1", "--kv-events", f"tcp://127.0.0.1:{kv_port}", "--kv-events-replay", replay]
    with Daemon(*flags) as daemon:
        server = Server(daemon, f"http://127.0.0.1:{port}")
        first = _first_answer(server, "/health")
        assert (first.status, first.json["error"]["code"]) == (503, "loading")
        early = server.post("/v1/completions", BODY)
        assert (early.status, early.json["error"]["code"], early.headers["retry-after"]) == (503, "loading", "1")
        assert daemon.wait_ready()["http"] == server.url
        assert server.get("/health").status == 200
        assert server.post("/v1/completions", BODY | {"max_tokens": 1}).status == 200
        _full(server)
        _told(server, events, replay)
        _drained(daemon, server)
        assert daemon.wait_exit() == 0
        assert not daemon.survivors(within=20)


@pytest.mark.slow
def test_an_engine_without_progress_is_not_healthy() -> None:
    """Waits for half a step timeout: the rank is stopped while a request runs, and goes on afterwards."""
    with Daemon("--port", "0", "--step-timeout", "20") as daemon:
        server = Server(daemon, daemon.wait_ready()["http"])
        running = _open_stream(server, 20_000)
        running.read(10)
        rank = daemon.children()["model_worker.0"]
        rank.suspend()
        try:
            wait_until(lambda: server.get("/health").status == 503, 60, "the stillstand is told")
            assert server.get("/health").json["error"]["code"] == "no_progress"
        finally:
            rank.resume()
        wait_until(lambda: server.get("/health").status == 200, 60, "serving again")
        running.close()


def _first_answer(server: Server, path: str) -> Reply:
    deadline = time.monotonic() + 60
    while True:
        try:
            return server.get(path)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _open_stream(server: Server, tokens: int) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = json.dumps(BODY | {"stream": True, "max_tokens": tokens})
    connection.request("POST", "/v1/completions", body, KEY | {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    return response


def _full(server: Server) -> None:
    """One runs, one waits, the next is told to come again; then the first ones leave."""
    running = _open_stream(server, 20_000)
    running.read(10)
    waiting = threading.Thread(target=lambda: server.post("/v1/completions", BODY | {"max_tokens": 1}, KEY))
    waiting.start()
    wait_until(lambda: _metric(server, "vllm:num_requests_waiting") == 1, 60, "one request waits")
    refused = server.post("/v1/completions", BODY, KEY)
    assert (refused.status, refused.json["error"]["code"], refused.headers["retry-after"]) == (429, "overloaded", "1")
    streamed = server.post("/v1/completions", BODY | {"stream": True}, KEY)
    assert streamed.status == 429
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="x")
    running.close()
    waiting.join(20)
    assert not waiting.is_alive()


def _told(server: Server, events: zmq.Socket[bytes], replay: str) -> None:
    """What a router learns of a prompt that was just computed: its pages, chained, with their tokens. And once more."""
    ids = server.post("/tokenize", {"prompt": "A router wants to know where this prefix is. " * 8}).json["tokens"]
    server.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}})
    chain: list[int] = []
    parent = None
    numbers: list[int] = []
    heard = []
    while len(chain) < len(ids) // 16 * 16:
        assert events.poll(10_000), "no event came"
        topic, number, payload = events.recv_multipart()
        assert topic.decode() == f"kv@127.0.0.1:{server.address[1]}@tiny"
        numbers.append(int.from_bytes(number, "big"))
        heard.append([b"", topic, number, payload])
        _, batch, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        for event in batch:
            if (
                event["type"] == "BlockStored"
                and event["parent_block_hash"] == parent
                and event["token_ids"][0] == (ids[len(chain)])
            ):
                assert len(event["token_ids"]) == 16 * len(event["block_hashes"])
                assert event["block_size"] == 16
                chain += event["token_ids"]
                parent = event["block_hashes"][-1]
    assert chain == ids[: len(chain)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    events.close()
    asked: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    asked.connect(replay)
    asked.send_multipart([b"no question"])
    asked.send_multipart([b"", numbers[0].to_bytes(8, "big")])
    for expected in [*heard, [b"", b"", (-1).to_bytes(8, "big", signed=True), b""]]:
        assert asked.poll(30_000), "no answer came"
        assert asked.recv_multipart() == expected
    asked.close()


def _drained(daemon: Daemon, server: Server) -> None:
    """After SIGTERM nothing new is taken, and what runs comes to its end."""
    running = _open_stream(server, 200)
    running.read(10)
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/health").status == 503, 60, "draining is told")
    late = server.post("/v1/completions", BODY)
    assert (late.status, late.json["error"]["code"]) == (503, "draining")
    rest = running.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in rest


def _metric(server: Server, name: str) -> float:
    lines = server.get("/metrics").data.decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])
