"""A recorded run is repeated bit by bit; a different decision is noticed; the timeline is valid JSON that adds up."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import pytest

from tests.scheduler.fake_rank import VOCAB
from tests.scheduler.harness import Harness, config, random_prompt, request
from vibe_sgl_lite.runtime.chrome_trace import WORKERS
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.messages import StepResult, StepTimes, pack_ids
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.planner import StepPlanner
from vibe_sgl_lite.scheduler.policies import POLICIES
from vibe_sgl_lite.scheduler.tools.replay import ReplayError, replay
from vibe_sgl_lite.scheduler.tools.timeline import FILE_NAME, Timeline
from vibe_sgl_lite.scheduler.tools.trace import TraceWriter, read_trace


def record(folder: Path, policy: str = "fcfs", seed: int = 0, requests: int = 40) -> Path:
    """A run under pressure with everything in it; returns the trace's path. The timeline goes to `folder`."""
    rng = random.Random(seed)
    settings = config(
        num_pages=40, policy=policy, max_queued_requests=12, conservativeness=0.1, draft_tokens=2 * (policy == "lpm")
    )
    path = folder / "run.trace"
    h = Harness(settings, observers=lambda h: [TraceWriter(path, settings), Timeline(folder, lambda: h.now)])
    prefix = [rng.randrange(VOCAB) for _ in range(30)]
    for uid in range(0, requests * 2, 2):
        h.add(
            request(
                uid, random_prompt(rng, rng.randrange(1, 60), [prefix]), max_new_tokens=rng.randrange(1, 90),
                n=rng.choice([1, 2]), priority=rng.randrange(3), stop_token_ids=(1,),
            )
        )  # fmt: skip
        for _ in range(rng.randrange(3)):
            h.step()
        if rng.random() < 0.2 and h.live():
            h.abort(rng.choice(h.live()))
        if rng.random() < 0.1 and h.live():
            h.stop_matched(rng.choice(h.live()))
        if rng.random() < 0.1:
            h.lose_ranks()
            h.ranks_ready()
        h.scheduler.flush_cache(0.0)
    h.run()
    h.scheduler.close()
    return path


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_decides_the_same(tmp_path: Path, policy: str) -> None:
    path = record(tmp_path, policy)
    summary, core = replay(path)
    assert summary.steps > 50
    assert summary.requests == 40
    assert core.idle
    assert core.stats()["num_retractions"]
    assert core.state.epoch > 1


def test_another_decision_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record(tmp_path)
    affordable = StepPlanner._affordable
    monkeypatch.setattr(StepPlanner, "_affordable", lambda self, start, wanted: min(5, affordable(self, start, wanted)))
    with pytest.raises(ReplayError, match=re.escape("decided differently")):
        replay(path)


def test_a_cut_trace_is_read_to_its_end(tmp_path: Path) -> None:
    path = record(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    _, events = read_trace(path)
    count = len(list(events))
    path.write_bytes(whole)
    assert len(list(read_trace(path)[1])) == count + 1
    assert replay(path)[0].events == count + 1


def test_a_full_disk_ends_the_observers_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full takes nothing; the run goes on, and each observer says so once."""
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    settings = config()
    h = Harness(settings, observers=lambda h: [TraceWriter("/dev/full", settings), Timeline(tmp_path, lambda: h.now)])
    for uid in range(60):
        h.add(request(uid, range(40), max_new_tokens=9))
    h.run(checked=False)
    h.scheduler.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, warnings
    assert all("No space left on device" in warning for warning in warnings)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x05\x00\x00\x00hello")
    with pytest.raises(ConfigError, match="no scheduler trace"):
        read_trace(path)
    with pytest.raises(ConfigError, match="No such file"):
        TraceWriter(tmp_path / "missing" / "x", config())


def test_the_timeline_adds_up(tmp_path: Path) -> None:
    summary = replay(record(tmp_path))[0]
    events = json.loads((tmp_path / FILE_NAME).read_text())
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"scheduler", "model_worker", "requests"}
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    lost = [e["args"]["steps"] for e in events if e["name"] == "ranks lost"]
    assert sum(lost) > 0
    assert len(steps) == summary.steps - sum(lost)
    assert all(e["args"]["tokens"] >= e["args"]["decode_rows"] + e["args"]["prefill_rows"] > 0 for e in steps)
    ends = [e["ts"] + e["dur"] for e in steps]
    assert all(later["ts"] >= end - 0.2 for end, later in zip(ends, steps[1:], strict=False)), "steps overlap"
    begun = sorted(e["id"] for e in events if e["ph"] == "b" and e["name"] == "request")
    ended = sorted(e["id"] for e in events if e["ph"] == "e" and e["name"] == "request")
    assert begun == ended
    assert len(begun) == len(set(begun))


def test_the_parts_of_a_step_lie_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rank's own times place its step; its parts follow each other in it, and what came before ends where it begins.

    Timeline and rank have one clock here: 50 ms a step, 8 of them in no part, and 20 ms from one step to the next.
    """
    settings = config(num_pages=64, chunked_prefill_size=512)
    now = 0.0
    timeline = Timeline(tmp_path, lambda: now)
    core = Scheduler(settings, [timeline])
    core.add(request(1, range(40), max_new_tokens=4), now)
    steps = 0
    while (batch := core.schedule(now)) is not None:
        began = now + 0.02
        now = began + 0.05
        step = core.oldest_step
        assert step is not None
        tokens = pack_ids([7] * step.num_rows)
        times = StepTimes(began, {"idle": 0.015, "other": 0.005}, {"apply": 0.002, "attention": 0.04, "other": 0.008})
        core.complete(StepResult(batch.step, tokens, total_s=0.05, times=times), now)
        steps += 1
    with caplog.at_level(logging.INFO):
        core.close()
    assert steps == 4
    spans = [e for e in json.loads((tmp_path / FILE_NAME).read_text()) if e["ph"] == "X" and e["pid"] == WORKERS]
    assert [e["name"].split()[0] for e in spans] == ["step", "idle", "apply", "attention"] * steps
    for number in range(steps):
        step_span, idle, apply, attention = (
            (round(e["ts"] / 1e3, 3), round((e["ts"] + e["dur"]) / 1e3, 3)) for e in spans[4 * number : 4 * number + 4]
        )
        start = 20.0 + 70 * number
        assert step_span == (start, start + 50)
        assert idle == (start - 20, start - 5)
        assert apply == (start, start + 2)
        assert attention == (start + 2, start + 42)
    means = {e["name"]: e["args"] for e in json.loads((tmp_path / FILE_NAME).read_text()) if "mean" in e["name"]}
    parts = {"whole step": 50, "apply": 2, "attention": 40, "other": 8, "idle": 15}
    assert means == {"mean of 3 decode steps, ms": parts, "mean of 1 steps with prompts, ms": parts}
    assert "mean of 3 decode steps, ms: whole step 50.0, apply 2.0, attention 40.0" in caplog.text
