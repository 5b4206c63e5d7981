"""`/watch` and the page: they tell what the engine does."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite.runtime.messages import AddRequest, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.snapshot import MAX_NODES, MAX_ROWS

STATIC = Path(__file__).resolve().parents[2] / "http_server" / "static"


@contextmanager
def watching(server: Server) -> Iterator[Iterator[dict[str, Any]]]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("GET", "/watch")
    response = connection.getresponse()
    assert response.status == 200

    def events() -> Iterator[dict[str, Any]]:
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    yield events()
    response.close()
    connection.close()


def test_watchers_see_rows_pages_and_a_shared_prefix(server: Server) -> None:
    server.wait_idle()
    server.post("/flush_cache", {})
    prefix = "The quick brown fox jumps over the lazy dog. " * 8
    for ending in ("One", "Two"):
        server.post("/v1/completions", {"prompt": prefix + ending * 20, "max_tokens": 1})
    body = {"prompt": prefix + "One" * 20, "max_tokens": 400, "ignore_eos": True, "n": 2, "stream": True}
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read(20)
    with watching(server) as events:
        view = next(view for view in events if len(view["rows"]) == 2)
    response.close()
    connection.close()
    assert {row["phase"] for row in view["rows"]} == {"decode"}
    assert sorted(row["index"] for row in view["rows"]) == [0, 1]
    assert all(row["cached"] > 16 and row["prompt"] > row["cached"] for row in view["rows"])
    stats = view["stats"]
    assert len(view["page_map"]) * view["cell_pages"] >= stats["kv_pages_total"]
    assert "3" in view["page_map"]  # a cell shows the highest of its pages
    top = [place for place, node in enumerate(view["nodes"]) if node["text"].startswith("The quick brown fox")]
    assert len(top) == 1
    assert view["nodes"][top[0]]["parent"] == -1
    assert view["nodes"][top[0]]["users"] == 2
    assert sum(node["parent"] == top[0] for node in view["nodes"]) >= 2  # where the two prompts part
    server.wait_idle()


def test_watchers_share_five_looks_a_second_and_nobody_looks_alone(server: Server) -> None:
    with watching(server) as one, watching(server) as other:
        began = time.monotonic()
        seen = [next(one) and next(other) for _ in range(6)]
        assert time.monotonic() - began >= 0.9
    assert seen[0]["model"] == "tiny"
    deadline = time.monotonic() + 5
    while server.get("/server_info").json["http"]["tasks"] > 8:
        assert time.monotonic() < deadline


def test_a_snapshot_is_small_and_quick_whatever_there_is() -> None:
    config = SchedulerConfig(num_pages=65_536, page_size=16, max_running_requests=256, max_queued_requests=4096)
    core = Scheduler(config)
    params = resolve(
        SamplingParams(max_new_tokens=100),
        model_defaults={},
        end_token_ids=(),
        prompt_tokens=100,
        context_length=4096,
        vocab_size=2048,
    )
    for uid in range(500):
        core.add(AddRequest(uid, f"r{uid}", pack_ids(range(uid, uid + 100)), params), 0.0)
    while core.schedule(1.0) is not None:
        pass
    began = time.process_time()
    data = msgspec.json.encode(core.snapshot())
    assert time.process_time() - began < 0.5
    assert len(data) < 100_000
    view = json.loads(data)
    assert len(view["rows"]) <= MAX_ROWS
    assert len(view["nodes"]) <= MAX_NODES
    assert view["waiting"]


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    page = server.get("/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in STATIC.iterdir():
        reply = server.get(f"/static/{file.name}")
        assert (reply.status, reply.data) == (200, file.read_bytes())
        assert not re.search(r"https?://(?!www\.w3\.org)", file.read_text())
        assert "innerHTML" not in file.read_text()  # what a model writes is text
    for name in re.findall(r'(?:src|href)="(/[^"]*)"', page.data.decode()):
        assert server.get(name).status == 200


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/..%2fapp.py", "/static/", "/static/x.js", "/static//etc/passwd"]
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    reply = server.get(path)
    assert reply.status == (200 if path == "/static/" else 404)
    assert b"import" not in reply.data[:200]
