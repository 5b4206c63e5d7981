"""For how many drafts a decode row has room: by how its drafts have fared, and by what a token more costs in a step.

The ranks propose drafts and check them (`ForwardBatch`). If each draft of a row holds with probability p, given those
before it, the i-th brings p^i tokens. A token is worth what it costs now: a decode step's seconds over the tokens that
it yields, both by what was measured (scheduler/cost.py). So the i-th draft pays while

    p^i * seconds of the step / tokens of the step > seconds of one token more in it

Where a step is bound by computing, as with many rows, the right side is near the left one's factor, and nobody drafts;
where it is bound by reading weights, drafts cost next to nothing. A row with too low a p for even one rests, and tries
again after ever more steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.cost import CostModel, decode_work
from vibe_sgl_lite.scheduler.request import Request

MARGIN = 1.25  # a draft must bring so many times its cost: estimates err
FADE = 0.9  # weight of a row's past drafts with each row that has some; and of the past tokens a row
SHORTEST_REST, LONGEST_REST = 8, 128  # steps


class Speculation:
    """Rooms for drafts, and counts. drafts: rows that had some; draft_tokens: their drafts; accepted_tokens: those
    that held."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self._most = config.draft_tokens
        self._budget = config.draft_budget
        self._cost = cost
        self._yield = 1.0  # tokens of a decode row
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def rooms(self, requests: Collection[Request]) -> list[int] | None:
        """Of each decode row of the next step; None: nobody drafts."""
        most = min(self._most, self._budget // len(requests)) if requests else 0
        if most == 0:
            return None
        least = self._least_probability(requests)
        if least >= 1.0:
            return None
        rooms = [_room(request, least, most) for request in requests]
        return rooms if any(rooms) else None

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A row had so many drafts, of which so many held; none are no news."""
        self._yield += (1 - FADE) / 8 * (1 + accepted - self._yield)
        if drafted == 0:
            return
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        request.draft_hits = FADE * request.draft_hits + accepted
        request.draft_misses = FADE * request.draft_misses + (accepted < drafted)
        if accepted:
            request.draft_pause = SHORTEST_REST
        elif request.draft_rest == 1:
            _rest(request)

    def _least_probability(self, requests: Collection[Request]) -> float:
        """That a draft must hold with, to pay."""
        rows, context = len(requests), sum(request.num_computed_tokens for request in requests)
        worth = self._cost.seconds(decode_work(rows, rows + context)) / (rows * self._yield)
        return MARGIN * self._cost.one_more(context // rows) / worth if worth > 0.0 else 1.0


def _room(request: Request, least: float, most: int) -> int:
    """Drafts of a row, at most `most`. One that has rested tries single ones, whatever its past, until one fails."""
    if request.draft_rest > 1:
        request.draft_rest -= 1
        return 0
    p = request.draft_hits / (request.draft_hits + request.draft_misses)
    if p >= least:
        request.draft_rest = 0
        return min(most, int(math.log(least) / math.log(p))) if least > 0.0 else most
    if request.draft_rest == 1:
        return 1
    _rest(request)
    return 0


def _rest(request: Request) -> None:
    request.draft_rest = 1 + request.draft_pause
    request.draft_pause = min(2 * request.draft_pause, LONGEST_REST)
