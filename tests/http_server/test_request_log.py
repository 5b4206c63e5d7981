"""The line about each request, where nobody can take it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.http_server.request_log import RequestLog


class Broken:
    """A pipe whose reader is gone, or a file on a full disk."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_that_cannot_be_written_fails_no_request(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection was closed, and the next request on it failed."""

    async def nothing(*_: object) -> Any:
        raise AssertionError

    scope = {"method": "GET", "path": "/version", "headers": [], "query_string": b""}
    metrics = Metrics()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Broken())
        RequestLog(form, metrics).write(Exchange(scope, nothing, nothing, 0))
    assert metrics.responses == {499: 1}
