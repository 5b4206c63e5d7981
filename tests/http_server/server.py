"""A real engine with its HTTP server, and plain requests to it, below any client library."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tests.integration.daemon import Daemon
from vibe_sgl_lite import Client


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.data = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """The `data:` of a stream, decoded where it is JSON."""
        lines = [line[6:] for line in self.data.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Server:
    """daemon: the engine, whose `http` the ready line told."""

    def __init__(self, daemon: Daemon, url: str) -> None:
        self.daemon = daemon
        self.url = url
        self.tls: ssl.SSLContext | None = None  # for an https server
        self.address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Reply:
        connection: http.client.HTTPConnection
        if self.tls is None:
            connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection("localhost", self.address[1], timeout=timeout, context=self.tls)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, data, given | dict(headers or {}))
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("POST", path, body, headers)

    def stats(self) -> dict[str, Any]:
        with self.daemon.client() as client:
            return dict(client.stats())

    def client(self) -> Client:
        """Of the engine itself: what HTTP answers are compared with."""
        return self.daemon.client()

    def wait_idle(self, within: float = 10.0) -> dict[str, Any]:
        """Until nothing runs or waits; the statistics then."""
        deadline = time.monotonic() + within
        while True:
            stats = self.stats()
            if not any(stats[name] for name in ("num_running", "num_waiting", "requests_in_flight", "steps_in_flight")):
                return stats
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    with Daemon("--port", "0", *flags) as daemon:
        yield Server(daemon, daemon.wait_ready()["http"])
