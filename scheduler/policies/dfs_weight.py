"""Heaviest radix subtree first: requests under one prefix run together, one family after the other.

Every waiting request hangs at the node where its cached prefix ends. A subtree weighs as much as requests hang in it;
the tree is walked depth first, the heaviest branch first. The requests that hang at a node itself come after its
branches, for they share less: they are a branch without weight, which age alone brings forward.
The idea is SGLang's policy of that name; aging is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import RadixNode
from vibe_sgl_lite.scheduler.request import Request

MOST_LOOKED_UP = 512  # waiting requests that are placed in the tree; the rest follows in order of arrival
WEIGHT_PER_SECOND = 0.5  # aging: a branch gains so many requests' weight a second of its oldest request's waiting


class _Branch:
    """A node that has requests at it or below: how many, the oldest arrival, and where to go on."""

    __slots__ = ("children", "count", "oldest", "own")

    def __init__(self, oldest: float) -> None:
        self.count = 0
        self.oldest = oldest
        self.own: list[Request] = []
        self.children: list[_Branch] = []


class DfsWeight:
    """See the module."""

    preempts = False

    def order(self, waiting: Sequence[Request], memory: KVMemory, now: float) -> Iterable[Request]:
        top = _Branch(now)
        branches: dict[int, _Branch] = {}
        for request in waiting[:MOST_LOOKED_UP]:
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
            branch.children.sort(key=lambda b: b.count + WEIGHT_PER_SECOND * (now - b.oldest))
            stack += branch.children
        ordered += waiting[MOST_LOOKED_UP:]
        return ordered

    def victim(self, candidate: Request, running: Iterable[Request]) -> Request | None:
        return None


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
