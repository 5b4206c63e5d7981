"""What the engine did in the last seconds, as one line for the log; nothing while it is idle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

STATUS_S = 10.0
Stats = Mapping[str, int | float | str | bool]


class StatusLine:
    """stats: `Scheduler.stats`. say: takes a line. now: seconds, as in `look`."""

    def __init__(self, stats: Callable[[], Stats], say: Callable[[str], None], now: float) -> None:
        self._stats = stats
        self._say = say
        self._before, self._at = stats(), now

    def look(self, now: float) -> None:
        """Say a line if it is time for one; costs nothing otherwise."""
        if now - self._at < STATUS_S:
            return
        before, after, seconds = self._before, self._stats(), now - self._at
        self._before, self._at = after, now
        steps = int(after["steps_total"]) - int(before["steps_total"])
        if not (steps or after["num_running"] or after["num_waiting"]):
            return
        prompt, cached, made = (
            int(after[name]) - int(before[name])
            for name in ("prompt_tokens_total", "cached_tokens_total", "completion_tokens_total")
        )
        pages = int(after["kv_pages_total"])
        held = pages - int(after["kv_pages_free"]) - int(after["kv_pages_evictable"])
        self._say(
            f"{made / seconds:.1f} tokens/s generated, {prompt / seconds:.1f} prompt tokens/s, "
            f"{100 * cached / prompt if prompt else 0.0:.0f} % of them cached; {after['num_running']} running, "
            f"{after['num_waiting']} waiting, {100 * held / pages:.0f} % of the KV cache in use"
        )
