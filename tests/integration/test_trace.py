"""A real run, recorded: the replay decides the same, the simulator takes its arrivals, the timeline can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.daemon import ROOT, running
from vibe_sgl_lite import SamplingParams

SAMPLES = 26  # of 25 requests, one of which asks for two


def command(*words: str) -> str:
    """What `python -m WORDS` prints; AssertionError with its stderr when it fails."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_steps(track: list[dict[str, Any]], count: int) -> None:
    """Every step has its parts within it, together no longer than it; waiting and sending lie between the steps."""
    spans = sorted((event for event in track if event["ph"] == "X"), key=lambda event: (event["ts"], -event["dur"]))
    steps = [span for span in spans if span["name"].startswith("step ")]
    assert len(steps) == count
    rounding = 0.3  # microseconds; times are written to a tenth
    inside: list[dict[str, Any]] = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        begin, end = step["ts"], step["ts"] + step["dur"]
        parts = [span for span in spans if begin <= span["ts"] < end and span is not step]
        assert {"apply", "prepare", "embedding", "qkv", "attention", "norm", "head"} <= {part["name"] for part in parts}
        assert all(part["ts"] + part["dur"] <= end + rounding for part in parts)
        assert 0 < sum(part["dur"] for part in parts) <= step["dur"] + rounding
        assert following is None or end <= following["ts"] + rounding
        inside += parts
    between = ("idle", "send", "unpack", "relay")
    stray = [span for span in spans if span not in inside and span not in steps and span["name"] not in between]
    assert [span["name"] for span in stray] == []
    means = [event for event in track if event["name"].startswith("mean of ")]
    assert sum(int(event["name"].split()[2]) for event in means) == count


def test_a_recorded_run_is_replayed(tmp_path: Path) -> None:
    trace, profile = tmp_path / "run.trace", tmp_path / "profile"
    flags = ["--trace", str(trace), "--profile", str(profile), "--max-total-tokens", "640", "--schedule-policy", "lpm"]
    greedy = SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True)
    with running(*flags) as daemon:
        with daemon.client() as client:
            outputs = client.generate([f"Story number {n % 5} of the little dog" for n in range(20)], greedy)
            outputs += [client.chat([{"role": "user", "content": "Sort: 3 1 2"}], SamplingParams(temperature=0))]
            client.generate("The cat", SamplingParams(max_new_tokens=60, n=2, seed=3))
            client.generate("Once", SamplingParams(max_new_tokens=60, stop="a", temperature=0))
            with client.stream("Another", greedy) as early:
                next(early)
            while client.stats()["num_running"]:
                pass
            client.flush_cache()
            outputs += [client.generate("The end", greedy)]
            stats = client.stats()
        assert all(output.finish_reason in ("stop", "length") for output in outputs)
        assert int(stats["num_retractions"]) > 0
        assert daemon.stop() == 0

    identical, replayed = command("vibe_sgl_lite.scheduler.tools.replay", str(trace)).splitlines()
    assert identical.startswith("identical: ")
    assert f"{stats['steps_total']} steps" in identical
    for counter in ("completion_tokens_total", "cached_tokens_total", "num_retractions", "evicted_pages_total"):
        assert f"'{counter}': {stats[counter]}" in replayed

    report = json.loads(
        command(
            "vibe_sgl_lite.scheduler.tools.simulate", "--trace", str(trace), "--policies", "fcfs,lpm", "--pages", "40"
        ).splitlines()[-1]
    )
    assert [policy["requests"] for policy in report["reports"]] == [SAMPLES] * 2

    merged = Path(command("vibe_sgl_lite.runtime.chrome_trace", str(profile)).strip())
    events = json.loads(merged.read_text())
    tracks = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert set(tracks) == {"scheduler", "model_worker", "requests", "detokenizer", "tokenizer_manager"}
    assert {event["pid"] for event in events if event["ph"] == "X"} == set(tracks.values()) - {tracks["requests"]}
    times = [event["ts"] for event in events if event["ph"] == "X"]
    assert max(times) - min(times) < 120e6, "all tracks have the same clock"
    check_steps([event for event in events if event["pid"] == tracks["model_worker"]], int(stats["steps_total"]))
    lives = {kind: sum(e["ph"] == kind and e["name"] == "request" for e in events) for kind in "be"}
    assert lives["b"] == lives["e"] == SAMPLES
