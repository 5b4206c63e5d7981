"""Repeat a recorded run on the core and check that it decides the same, bit by bit.

python -m vibe_sgl_lite.scheduler.tools.replay FILE
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError, VibeError
from vibe_sgl_lite.runtime.messages import ForwardBatch
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.tools.trace import digest_of, read_trace


class ReplayError(VibeError):
    """The core decided differently from the recorded run; the message names event and step."""

    code = "replay"


class ReplaySummary(msgspec.Struct):
    """What a replayed trace held; `seconds` is the replay's own time."""

    events: int = 0
    requests: int = 0
    steps: int = 0
    seconds: float = 0.0


def replay(path: str | Path) -> tuple[ReplaySummary, Scheduler]:
    """Run a trace through a fresh core; returns the core as the run left it. Raises ReplayError, ConfigError."""
    config, events = read_trace(path)
    core = Scheduler(config)
    summary = ReplaySummary()
    began = time.perf_counter()
    for event in events:
        decision = getattr(core, event.call)(*event.args)
        if digest_of(decision) != event.digest:
            raise ReplayError(
                f"event {summary.events}, {event.call} at {event.args[-1]}: the core decided differently; "
                f"{summary.steps} steps before were the same"
            )
        summary.requests += event.call == "add"
        summary.steps += isinstance(decision, ForwardBatch)
        summary.events += 1
    summary.seconds = time.perf_counter() - began
    return summary, core


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a trace, written with --trace")
    args = parser.parse_args()
    try:
        summary, core = replay(args.file)
    except (ReplayError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(
        f"identical: {summary.events} events, {summary.requests} requests, {summary.steps} steps "
        f"in {summary.seconds:.2f} s\n{core.stats()}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
