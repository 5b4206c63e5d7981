"""A line on stderr for each request when it ends, as text or as JSON (--log-requests)."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import msgspec

from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.metrics import Metrics


class RequestLog:
    def __init__(self, form: str, metrics: Metrics) -> None:
        self._form = form
        self._responses = metrics.responses

    def write(self, exchange: Exchange) -> None:
        status = exchange.status or 499  # the client left before an answer
        self._responses[status] = self._responses.get(status, 0) + 1
        if self._form == "none":
            return
        line = _facts(exchange, status)
        if self._form == "json":
            text = msgspec.json.encode(line).decode()
        else:
            text = " ".join(f"{key}={value}" for key, value in line.items())
        with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full: the answer is out
            sys.stderr.write(f"request {text}\n" if self._form == "text" else text + "\n")


def _facts(exchange: Exchange, status: int) -> dict[str, object]:
    facts: dict[str, object] = {"method": exchange.method, "path": exchange.path, "status": status}
    times = exchange.times
    if times is None:
        return facts
    now = asyncio.get_running_loop().time()
    facts |= {
        "rid": times.rid,
        "prompt_tokens": times.prompt_tokens,
        "cached_tokens": times.cached_tokens,
        "completion_tokens": times.completion_tokens,
        "seconds": round(now - times.began, 4),
        "finish": ",".join(times.finish_reasons) or "left",
    }
    if times.first is not None:
        facts["ttft"] = round(times.first - times.began, 4)
    if times.gaps:
        facts["itl"] = round(times.gap_s / times.gaps, 5)
    return facts
