"""Scheduling policies by name. A new one is a file here and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.scheduler.policies.base import SchedulePolicy
from vibe_sgl_lite.scheduler.policies.dfs_weight import DfsWeight
from vibe_sgl_lite.scheduler.policies.fcfs import Fcfs
from vibe_sgl_lite.scheduler.policies.lpm import LongestPrefixMatch
from vibe_sgl_lite.scheduler.policies.priority import Priority

__all__ = ["POLICIES", "SchedulePolicy", "make_policy"]

POLICIES: Mapping[str, Callable[[], SchedulePolicy]] = {
    "fcfs": Fcfs,
    "lpm": LongestPrefixMatch,
    "dfs-weight": DfsWeight,
    "priority": Priority,
}


def make_policy(name: str) -> SchedulePolicy:
    """Raises ConfigError for a name that is none of `POLICIES`."""
    if name not in POLICIES:
        raise ConfigError(
            f"schedule_policy={name!r} is unknown, choose one of: {', '.join(POLICIES)}", field="schedule_policy"
        )
    return POLICIES[name]()
