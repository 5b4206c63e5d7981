"""One engine for all examples that talk to a running one, and a web server for their pages."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator

import pytest

from tests.examples.test_examples import ROOT
from tests.http_server.server import Server, serving


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="package")
def pages() -> Iterator[str]:
    """The origin of a web server for the folder of the examples."""
    handler = functools.partial(Quiet, directory=str(ROOT / "examples"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="package")
def server(pages: str) -> Iterator[Server]:
    with serving("--cors-origin", pages) as server:
        yield server
