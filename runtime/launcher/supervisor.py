"""Which children start again when one dies, when, and when to give up. Knows no processes and no clock: see watch.py.

A child is in one of four states:

    starting ──ready──▶ running ──died──▶ backing off ──start_at──▶ starting
        └────────────────died───────────────▲    └──▶ (given up: the pipeline ends)

Children whose states depend on each other start again together: all ranks (their collectives wait for each other), and
with a scheduler all ranks too (they hold its slots). The others start again alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec

WINDOW_S = 60.0  # restarts further back are forgotten
FIRST_DELAY_S = 0.5  # between two starts of a group within the window, doubled each time; the first comes at once
MAX_DELAY_S = 2.0

State = Literal["starting", "running", "backing off"]


@dataclass
class _Child:
    group: str
    state: State = "starting"


@dataclass
class _Group:
    """Children that start again together. restarts: when, within the window. start_at: of the last one."""

    restarts: list[float] = field(default_factory=list)
    start_at: float = 0.0


class Supervisor:
    """The states of a pipeline's children. Times are seconds of any one clock.

    max_restarts: how many restarts of one group within WINDOW_S are tried; the next death gives up. 0 never restarts.
    """

    def __init__(self, children: Sequence[ChildSpec], max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._children = {spec.name: _Child("ranks" if spec.is_rank else spec.name) for spec in children}
        self._groups = {child.group: _Group() for child in self._children.values()}

    def state(self, name: str) -> State:
        return self._children[name].state

    @property
    def all_running(self) -> bool:
        return all(child.state == "running" for child in self._children.values())

    def ready(self, name: str) -> None:
        """A child that was starting can do its work."""
        if self._children[name].state == "starting":
            self._children[name].state = "running"

    def died(self, names: Collection[str], now: float) -> list[str] | None:
        """Some children are gone, or are to be ended: all that must be ended and started again with them, in order.

        They are backing off then, until `due` names them. None: too many restarts, give up.
        """
        lost = {self._children[name].group for name in names}
        if "scheduler" in lost:
            lost.add("ranks")
        for name in sorted(lost & self._groups.keys()):
            group = self._groups[name]
            group.restarts = [at for at in group.restarts if at > now - WINDOW_S]
            if len(group.restarts) >= self._max_restarts and any(self._children[n].group == name for n in names):
                return None
            delay = min(FIRST_DELAY_S * 2.0 ** (len(group.restarts) - 1), MAX_DELAY_S) if group.restarts else 0.0
            group.restarts.append(now)
            group.start_at = max(now, group.start_at + delay)
        ended = [name for name, child in self._children.items() if child.group in lost]
        for name in ended:
            self._children[name].state = "backing off"
        return ended

    def due(self, now: float) -> list[str]:
        """Who is to be started now; they are starting then."""
        names = [
            name
            for name, child in self._children.items()
            if child.state == "backing off" and self._groups[child.group].start_at <= now
        ]
        for name in names:
            self._children[name].state = "starting"
        return names
