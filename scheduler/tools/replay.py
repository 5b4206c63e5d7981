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
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.tools.trace import (
    Aborted,
    Added,
    Completed,
    Expired,
    Flushed,
    RanksCame,
    RanksDied,
    Scheduled,
    StopSeen,
    digest_of,
    read_trace,
)


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
        match event:
            case Added():
                same = digest_of(core.add(event.message, event.now)) == event.digest
                summary.requests += 1
            case Aborted():
                same = digest_of(core.abort(event.uid, event.now)) == event.digest
            case StopSeen():
                core.stop_matched(event.uid, event.now)
                same = True
            case Scheduled():
                same = digest_of(core.schedule(event.now)) == event.digest
                summary.steps += bool(event.digest)
            case Completed():
                same = digest_of(core.complete(event.result, event.now)) == event.digest
            case Expired():
                same = digest_of(core.expire(event.now)) == event.digest
            case RanksDied():
                same = digest_of(core.lose_ranks(event.epoch, event.now)) == event.digest
            case RanksCame():
                same = digest_of(core.ranks_ready(event.num_pages, event.now)) == event.digest
            case Flushed():
                same = core.flush_cache() == event.freed
        if not same:
            raise ReplayError(
                f"event {summary.events}, {type(event).__name__} at {event.now if hasattr(event, 'now') else '-'}: "
                f"the core decided differently; {summary.steps} steps before were the same"
            )
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
