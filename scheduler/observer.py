"""Watching a core: every call and what it decided, in order, to whoever wants to know.

tools/trace.py and tools/timeline.py are such observers.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from vibe_sgl_lite.scheduler.batch import Step

Call = Literal[
    "add", "abort", "stop_matched", "expire", "plan", "complete", "lose_ranks", "ranks_ready", "flush_cache",
    "open_host", "open_tier", "moves", "pages_moved",
    "pause", "resume", "sleep", "change_weights",
]  # fmt: skip


class SchedulerObserver(Protocol):
    def observe(self, call: Call, args: tuple[Any, ...], decision: object, newest: Step | None) -> None:
        """After the core has acted. args: of the call, `now` in seconds last. newest: the step scheduled last, while it
        is in flight."""

    def close(self) -> None: ...
