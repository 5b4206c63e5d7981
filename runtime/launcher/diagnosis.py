"""What is wrong with a pipeline's children: whether anything is, what came first, and who makes others hang."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from vibe_sgl_lite.runtime.launcher.boot import LOAD_FAILED
from vibe_sgl_lite.runtime.launcher.spawn import STACK_DUMP_S, ChildProcess
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.messages import ChildFailed

FAILED_EXIT_S = 1.0  # a child that said it failed may take this long to exit

Facts = Mapping[str, int | float | str]

log = logging.getLogger(__name__)


class WatchedChild:
    """What is known of one child's process; one that starts again gets a new one. facts: of its ready message."""

    def __init__(self, process: ChildProcess, now: float) -> None:
        self.process = process
        self.started = now
        self.facts: Facts | None = None
        self.last_seen = now
        self.failed: ChildFailed | None = None
        self.failed_at = 0.0


class Cause(NamedTuple):
    """In words, with the child's name, and whose it is; users_mistake: the user can fix it."""

    text: str
    name: str
    users_mistake: bool


def in_trouble(children: Collection[WatchedChild], *, may_leave: bool) -> bool:
    """A child is gone (unless it `may_leave` with exit code 0), or has said that it failed and stays."""
    now = time.monotonic()
    fine = (None, 0) if may_leave else (None,)
    return any(
        child.process.exit_code() not in fine or (child.failed is not None and now - child.failed_at > FAILED_EXIT_S)
        for child in children
    )


def likeliest_cause(children: Collection[WatchedChild]) -> Cause:
    """The likeliest first cause: a kill, then a user's mistake, a child's words, a bare exit."""

    def rank(child: WatchedChild) -> int:
        code = child.process.exit_code()
        if code is not None and code < 0:
            return 0
        if child.failed is not None:
            return 1 if child.failed.user else 2
        return 3 if code is not None else 4

    child = min(children, key=rank)
    name, users_mistake = child.process.name, rank(child) == 1 or child.process.exit_code() == LOAD_FAILED
    if rank(child) in (1, 2) and child.failed is not None:
        return Cause(f"{name}: {one_line(child.failed.message)}", name, users_mistake)
    when = "" if child.facts is not None else " while starting"
    return Cause(f"{name} {child.process.exit_words()}{when}", name, users_mistake)


def end_hung(children: Mapping[str, WatchedChild], name: str, why: str) -> Cause:
    """Dump a hung child's stacks (of a rank: all ranks', they wait for each other), and kill whom it is due to."""
    named = children.get(name)
    suspects = [] if named is None else [named]
    if named is not None and named.process.spec.is_rank:
        suspects = [child for child in children.values() if child.process.spec.is_rank]
    # Whoever misses an answer cannot tell which rank holds the others up; one that was stopped is the one.
    culprit = next((child for child in suspects if child.process.is_stopped()), named)
    name = name if culprit is None else culprit.process.name
    log.error("%s hangs: %s; dumping its stacks and killing it", name, why)
    for child in suspects:
        child.process.dump_stacks()
    time.sleep(STACK_DUMP_S)
    if culprit is not None:
        culprit.process.kill()
    return Cause(f"{name} hung and was killed: {one_line(why)}", name, users_mistake=False)
