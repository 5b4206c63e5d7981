"""One look at the engine for all who watch it, and none without them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.engine import Engine
from vibe_sgl_lite.http_server.metrics import Histogram, SharedMetrics
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

LOOKS_A_SECOND = 5


class LiveView:
    def __init__(self, engine: Engine, metrics: SharedMetrics, tokenizer: Callable[[], Tokenizer], model: str) -> None:
        self._engine, self._metrics, self._tokenizer, self._model = engine, metrics, tokenizer, model
        self._event = b""
        self._looked_at = -1.0
        self._looking = asyncio.Lock()

    async def event(self) -> bytes:
        """The latest look as an event, at most 1 / LOOKS_A_SECOND old. Raises VibeError."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            if loop.time() - self._looked_at >= 0.9 / LOOKS_A_SECOND:
                values = await self._engine.query("watch")
                self._event = sse.event(self._view(str(values["snapshot"])))
                self._looked_at = loop.time()
        return self._event

    def _view(self, snapshot: str) -> dict[str, object]:
        """snapshot: JSON of scheduler/snapshot.py. Nodes of the tree get the text that they begin with."""
        view = msgspec.json.decode(snapshot)
        assert isinstance(view, dict)
        tokenizer = self._tokenizer()
        for node in view["nodes"]:
            node["text"] = tokenizer.decode(node.pop("head"), skip_special_tokens=False)
        metrics = self._metrics.total()
        view["http"] = {"first_token": _sums(metrics.first_token), "inter_token": _sums(metrics.inter_token)}
        view["model"] = self._model
        return view


def _sums(histogram: Histogram) -> dict[str, float]:
    return {"count": sum(histogram.counts), "sum": histogram.total}
