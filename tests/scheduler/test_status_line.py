"""A line for the log every ten seconds of work, and none while nothing runs."""

from __future__ import annotations

from vibe_sgl_lite.scheduler.status_line import STATUS_S, StatusLine

IDLE: dict[str, int | float | str | bool] = {
    "steps_total": 5, "num_running": 0, "num_waiting": 0, "prompt_tokens_total": 100, "cached_tokens_total": 40,
    "completion_tokens_total": 50, "kv_pages_total": 200, "kv_pages_free": 150, "kv_pages_evictable": 50,
}  # fmt: skip


def test_rates_are_of_the_time_since_the_line_before() -> None:
    stats, lines = dict(IDLE), list[str]()
    status = StatusLine(lambda: dict(stats), lines.append, 100.0)
    stats |= {
        "steps_total": 9, "num_running": 3, "num_waiting": 2, "prompt_tokens_total": 300, "cached_tokens_total": 90,
        "completion_tokens_total": 170, "kv_pages_free": 50, "kv_pages_evictable": 20,
    }  # fmt: skip
    status.look(100.0 + STATUS_S - 0.1)
    assert lines == []
    status.look(120.0)
    assert lines.pop() == (
        "6.0 tokens/s generated, 10.0 prompt tokens/s, 25 % of them cached; 3 running, 2 waiting, "
        "65 % of the KV cache in use"
    )
    status.look(121.0)
    assert lines == []
    status.look(130.0)  # nothing moved, but requests wait: that is worth a line
    assert lines.pop().startswith("0.0 tokens/s generated, 0.0 prompt tokens/s, 0 % of them cached; 3 running")


def test_idle_says_nothing_and_the_last_seconds_of_work_are_told() -> None:
    stats, lines = dict(IDLE), list[str]()
    status = StatusLine(lambda: dict(stats), lines.append, 0.0)
    for now in (10.0, 20.0, 30.0):
        status.look(now)
    assert lines == []
    stats |= {"steps_total": 8, "completion_tokens_total": 60}  # a request came and went
    status.look(40.0)
    assert len(lines) == 1
    assert lines[0].startswith("1.0 tokens/s")
    status.look(50.0)
    assert len(lines) == 1
