"""Downloads, from a hub of our own on loopback through the real library."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.settings import hub
from vibe_sgl_lite.runtime.settings.model_source import ModelSource, find_model

COMMIT = "a" * 40
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 8000, "README.md": b"not asked for"}


class Hub(BaseHTTPRequestHandler):
    """The few paths that the library asks. Half of the weights comes at once, the rest when `go` is set."""

    go: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" in self.path:
            data = FILES[name]
            self._head(len(data), name)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if name == "model.safetensors":
                assert self.go.wait(60)
            self.wfile.write(data[len(data) // 2 :])
            return
        listed = [self._entry(name) for name in FILES]
        body = json.dumps(
            listed if "/tree/" in self.path else {"id": "a/b", "sha": COMMIT, "siblings": listed}
        ).encode()
        self._head(len(body), None)
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self._head(len(FILES[name]), name)

    def _head(self, size: int, name: str | None) -> None:
        self.send_response(200)
        self.send_header("content-length", str(size))
        if name is None:
            self.send_header("content-type", "application/json")
        else:
            self.send_header("etag", f'"{hashlib.sha1(FILES[name]).hexdigest()}"')
            self.send_header("x-repo-commit", COMMIT)
        self.end_headers()

    @staticmethod
    def _entry(name: str) -> dict[str, object]:
        blob = hashlib.sha1(FILES[name]).hexdigest()
        size = len(FILES[name])
        return {"type": "file", "path": name, "rfilename": name, "size": size, "oid": blob, "blobId": blob}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """The handler of this test's own hub."""
    from huggingface_hub import constants

    handler: type[Hub] = type("ThisHub", (Hub,), {"go": threading.Event(), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler
        handler.go.set()
        server.shutdown()


def test_a_download_tells_how_far_it_is(
    served: type[Hub], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "TELL_FIRST_S", 0.01)
    monkeypatch.setattr(hub, "TELL_EVERY_S", 0.02)
    found: list[ModelSource] = []
    thread = threading.Thread(target=lambda: found.append(find_model("a/b", weights=True)))
    thread.start()
    half = re.compile(r"downloading a/b: (\d\.\d) of 2\.0 MB \(\d+ %\), \d+\.\d MB/s, now model\.safetensors")
    deadline = time.monotonic() + 60
    while not half.search(caplog.text):
        assert thread.is_alive(), caplog.text
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)
    served.go.set()
    thread.join(60)
    folder = found[0].folder
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (folder / "README.md").exists()
    lines = len(caplog.records)
    time.sleep(0.1)
    assert len(caplog.records) == lines, "it goes on telling"


def test_what_is_in_the_cache_is_not_told(served: type[Hub], caplog: pytest.LogCaptureFixture) -> None:
    served.go.set()
    first = find_model("a/b", weights=True).folder
    asked = len(served.asked)
    with caplog.at_level(logging.DEBUG, hub.__name__):
        assert find_model("a/b", weights=True).folder == first
    assert not [path for path in served.asked[asked:] if "/resolve/" in path]
    assert not [record for record in caplog.records if record.name == hub.__name__]
