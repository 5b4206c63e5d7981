"""Scheduling policies: who is next, and who may be pushed aside for it. A new one is a class here, a line in `POLICIES`
and a value of the flag.

Aging: every second of waiting improves a request's rank by a fixed amount, so that what arrives later can overtake it
only for a bounded time, and none starves. Only differences in age count: a long queue as such changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import RadixNode
from vibe_sgl_lite.scheduler.request import Request

LPM_MOST_WAITING = 128  # looking all of them up costs more than it brings beyond this: order of arrival for that pass
LPM_TOKENS_PER_SECOND = 100.0  # aging: a second of waiting is worth so many cached tokens
DFS_MOST_WAITING = 512  # waiting requests that are placed in the tree; the rest follows in order of arrival
DFS_WEIGHT_PER_SECOND = 0.5  # aging: a branch gains so many requests' weight a second of its oldest request's waiting
PRIORITY_SECONDS_PER_LEVEL = 30.0  # aging: so long a wait is worth one level of priority


class SchedulePolicy:
    """First come, first served; what other policies are made of. It keeps no state about requests.

    preempts: `victim` may name somebody.
    """

    preempts = False

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        """The waiting requests, the next to run first. `waiting` is in order of arrival. `now` in seconds."""
        return waiting

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        """Whom to retract so that `candidate`, for which there is no room, can run; None: it waits."""
        return None


class LongestPrefixMatch(SchedulePolicy):
    """Longest cached prefix first, so that what is cached is used before it is evicted: cached tokens plus age; ties by
    arrival."""

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        if len(waiting) > LPM_MOST_WAITING:
            return waiting
        rank = {r.uid: memory.cached_length(r) + LPM_TOKENS_PER_SECOND * (now - r.arrival) for r in waiting}
        return sorted(waiting, key=lambda r: (-rank[r.uid], r.seq))


class Priority(SchedulePolicy):
    """Higher priority plus age first, then arrival; a running request of lower priority makes room for a waiting one.

    Preemption looks at the given priorities alone, so that equals never swap places.
    """

    preempts = True

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        return sorted(waiting, key=lambda r: (-(r.priority + (now - r.arrival) / PRIORITY_SECONDS_PER_LEVEL), r.seq))

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        lower = [r for r in running if r.priority < candidate.priority and not r.guaranteed]
        return min(lower, key=lambda r: (r.priority, r.num_generated, -r.seq), default=None)


class DfsWeight(SchedulePolicy):
    """Heaviest radix subtree first: requests under one prefix run together, one family after the other.

    Every waiting request hangs at the node where its cached prefix ends. A subtree weighs as much as requests hang in
    it; the tree is walked depth first, the heaviest branch first. The requests that hang at a node itself come after
    its branches, for they share less: they are a branch without weight, which age alone brings forward.
    The idea is SGLang's policy of that name; aging is added.
    """

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        top = _Branch(now)
        branches: dict[int, _Branch] = {}
        for request in waiting[:DFS_MOST_WAITING]:
            _branch_of(memory.locate(request), request, branches, top).own.append(request)
        ordered: list[Request] = []
        stack = [top]
        while stack:
            branch = stack.pop()
            if branch.own and branch.children:
                leaf = _Branch(min(r.arrival for r in branch.own))
                leaf.own = branch.own
                branch.children.append(leaf)
            elif branch.own:
                ordered += branch.own
            # the stack turns the order round: the heaviest must be on top, and of equals the first
            branch.children.reverse()
            branch.children.sort(key=lambda b: b.count + DFS_WEIGHT_PER_SECOND * (now - b.oldest))
            stack += branch.children
        ordered += waiting[DFS_MOST_WAITING:]
        return ordered


class _Branch:
    """A node that has requests at it or below: how many, the oldest arrival, and where to go on."""

    __slots__ = ("children", "count", "oldest", "own")

    def __init__(self, oldest: float) -> None:
        self.count = 0
        self.oldest = oldest
        self.own: list[Request] = []
        self.children: list[_Branch] = []


def _branch_of(node: RadixNode | None, request: Request, branches: dict[int, _Branch], top: _Branch) -> _Branch:
    """The branch of `node`, counting the request in it and in all above."""
    lowest: _Branch | None = None
    below: _Branch | None = None
    while node is not None:
        branch = branches.get(id(node))
        fresh = branch is None
        if branch is None:
            branch = branches[id(node)] = _Branch(request.arrival)
        branch.count += 1
        branch.oldest = min(branch.oldest, request.arrival)
        if below is not None:
            branch.children.append(below)
        lowest = lowest or branch
        below = branch if fresh else None
        node = node.parent
    if below is not None:
        top.children.append(below)
    return lowest or top


POLICIES: Mapping[str, type[SchedulePolicy]] = {
    "fcfs": SchedulePolicy,
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
