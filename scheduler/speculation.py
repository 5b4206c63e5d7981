"""For how many drafts a decode row has room: by how its drafts have fared, and by what a token more costs in a step.

The ranks propose drafts and check them (`ForwardBatch`). If each draft of a row holds with probability p, given those
before it, the i-th brings p^i tokens. A token is worth what it costs now: a decode step's seconds over the tokens that
it yields, both by what was measured (scheduler/cost.py). So the i-th draft pays while

    p^i * seconds of the step / tokens of the step > seconds of one token more in it

Where a step is bound by computing, as with many rows, the right side is near the left one's factor: nobody drafts;
where it is bound by reading weights, drafts cost next to nothing. Room alone has a price too: for looking drafts up
and for counting with them, and on a GPU for kernels that take more rows. It is what steps with drafts were seen to take
longer than those of as many rows without, and must come back in tokens. A row that does not gain rests, the longer the
dearer a try is, and tries again after ever more steps, when others do: a step without any room is planned the quick
way. A new one begins with what the others' drafts are worth.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.cost import CostModel, decode_work
from vibe_sgl_lite.scheduler.request import Request

MARGIN = 1.25  # a draft must bring so many times its cost: estimates err
FADE = 0.9  # weight of a row's past drafts with each row that has some
GAIN_FADE = 0.95  # of its past gains with each row that has room
ROOM_S = 20e-6  # of the host, scheduler and rank, for a row with room, at least
TRIES = 8  # rows with room after a rest, before the next
SHORTEST_REST, LONGEST_REST = 8, 128  # steps
TRIES_SHARE = 0.01  # of the time, that tries of a row that does not gain may take
DEAREST_REST = 1024


class Speculation:
    """Rooms for drafts, and counts. drafts: rows that had some; draft_tokens: their drafts; accepted_tokens: those
    that held."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self._most = config.draft_tokens
        self._budget = config.draft_budget
        self._cost = cost
        self._step = 0
        self._yield = 1.0  # tokens of a decode row
        self._probability, self._gain = 0.5, 0.25  # a new request's
        self._seconds: dict[tuple[int, bool], float] = {}  # of steps of so many rows, without drafts and with
        self._with_room = 1  # rows of the last step that had any
        self._shortest = SHORTEST_REST
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def rooms(self, requests: Collection[Request]) -> list[int] | None:
        """Of each decode row of the next step; None: nobody drafts."""
        self._step += 1
        most = min(self._most, self._budget // len(requests)) if requests else 0
        if most == 0:
            return None
        rows, context = len(requests), sum(request.num_computed_tokens for request in requests)
        worth = self._cost.seconds(decode_work(rows, rows + context)) / (rows * self._yield)
        least = MARGIN * self._cost.one_more(context // rows) / worth if worth > 0.0 else 1.0
        if least >= 1.0:
            return None
        least_gain = self._least_gain(rows, worth) if self._cost.measured else 0.0
        self._shortest = min(max(SHORTEST_REST, int(TRIES * least_gain / TRIES_SHARE)), DEAREST_REST)
        rooms = [self._room(request, least, least_gain, most) for request in requests]
        self._with_room = max(1, len(rooms) - rooms.count(0))
        return rooms if any(rooms) else None

    def observe_step(self, rows: int, seconds: float, *, drafts: bool) -> None:
        """A step of so many decode rows alone took so long, with room for drafts or without."""
        key, known = (rows, drafts), self._seconds.get((rows, drafts), seconds)
        if seconds > 0.0:
            self._seconds[key] = known + (1 - FADE) * (min(seconds, 2 * known) - known)

    def _least_gain(self, rows: int, worth: float) -> float:
        """Tokens that room must bring a row. worth: seconds of one, where steps without drafts do not say it."""
        plain, drafting = self._seconds.get((rows, False)), self._seconds.get((rows, True))
        if plain is None or drafting is None:
            return ROOM_S / worth
        return max(ROOM_S, (drafting - plain) / self._with_room) * rows / plain

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A row with room had so many drafts, of which so many held."""
        request.draft_gain += (1 - GAIN_FADE) * (accepted - request.draft_gain)
        self._gain += (1 - GAIN_FADE) / 4 * (accepted - self._gain)
        self._yield += (1 - FADE) / 8 * (1 + accepted - self._yield)
        if drafted == 0:
            return
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        missed = int(accepted < drafted)
        request.draft_hits = FADE * request.draft_hits + accepted
        request.draft_misses = FADE * request.draft_misses + missed
        self._probability += (1 - GAIN_FADE) * (accepted / (accepted + missed) - self._probability)
        if accepted:
            request.draft_pause = self._shortest
        elif request.draft_tries:
            self._rest(request)

    def _room(self, request: Request, least: float, least_gain: float, most: int) -> int:
        """Drafts of a row, at most `most`. least: how likely one must hold; least_gain: tokens that room must bring."""
        if self._step < request.draft_until:
            return 0
        if request.draft_gain < 0.0:
            request.draft_gain = self._gain
            request.draft_hits, request.draft_misses = 2 * self._probability, 2 * (1 - self._probability)
            if self._probability < least or self._gain < least_gain:
                request.draft_pause = self._longest
        p = request.draft_hits / (request.draft_hits + request.draft_misses)
        gains = request.draft_gain >= least_gain
        if p >= least and gains:
            request.draft_tries = 0
        elif request.draft_tries == 0:
            self._rest(request)
            return 0
        else:
            request.draft_tries -= 1
            if request.draft_tries == 0:
                self._rest(request)
        if p < least:
            return 1
        return min(most, int(math.log(least) / math.log(p))) if least > 0.0 and p < 1.0 else most

    def _rest(self, request: Request) -> None:
        """Until a multiple of as many steps as the pause has, which is when others come back too."""
        pause = max(request.draft_pause, self._shortest)
        request.draft_until = (self._step + pause // 2) // pause * pause + pause
        request.draft_tries = TRIES
        request.draft_pause = min(2 * pause, self._longest)

    @property
    def _longest(self) -> int:
        return max(LONGEST_REST, self._shortest)
