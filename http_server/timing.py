"""When the parts of a call came, and what is counted of it at its end."""

from __future__ import annotations

from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.runtime.messages import Chunk, Usage

ID_BYTES = 4


class CallTimes:
    """Of one call, in seconds of the event loop's clock. first: its first token. gaps, gap_s: times between tokens.
    rid: of its first request."""

    def __init__(self, metrics: Metrics, began: float, rid: str) -> None:
        self.began = began
        self.rid = rid
        self.first: float | None = None
        self.last = began
        self.gaps = 0
        self.gap_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []
        self._metrics = metrics
        self._last: dict[int, float] = {}  # by sample

    def on_chunk(self, index: int, chunk: Chunk, now: float) -> None:
        count = len(chunk.token_ids) // ID_BYTES
        if count:
            before = self._last.get(index)
            self._last[index] = self.last = now
            if before is not None:
                gap = (now - before) / count
                self.gaps += count
                self.gap_s += now - before
                self._metrics.inter_token.observe(gap, count)
            elif self.first is None:
                self.first = now
                self._metrics.first_token.observe(now - self.began)
        if chunk.finish is not None:
            self._on_end(chunk.finish.reason, chunk.usage, now)

    def _on_end(self, reason: str, usage: Usage | None, now: float) -> None:
        self.finish_reasons.append(reason)
        metrics = self._metrics
        metrics.finished[reason] = metrics.finished.get(reason, 0) + 1
        metrics.end_to_end.observe(now - self.began)
        if usage is not None:
            metrics.prompt_tokens.observe(usage.prompt_tokens)
            metrics.generation_tokens.observe(usage.completion_tokens)
            self.prompt_tokens = usage.prompt_tokens
            self.cached_tokens = usage.cached_tokens
            self.completion_tokens += usage.completion_tokens
