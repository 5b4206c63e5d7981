"""For how many drafts each decode row has room: as many as gain time, by what steps with and without were seen to take.

The ranks propose drafts and check them (`ForwardBatch`). Of each request it is known how often something was proposed,
and how likely a draft holds, given those before it: with p, room for k yields p + p^2 + ... + p^k tokens more.
What a step with room takes is measured, for each number of rows and size of room, as a multiple of one without: how
it grows depends on the device, its kernels and what proposes. Of some sizes that one is taken that yields most tokens a
second, if these are more than without any. A row's room ends where the next draft brings less than a token more in a
step costs by the cost model.

Estimates err and texts change, so nothing is risked but what an account allows. Its unit is a step without drafts. Each
step pays in a small share of one; a step with drafts books what it gained or lost: tokens more, and time more.
What should gain draws on one account, and stops while that is overdrawn. The other one is for trying anew what did not
gain, all rows at once. So a load that never gains loses that share and the first credit; where trying costs nearly
nothing, it is done nearly always.

Depends on nothing but its inputs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.cost import CostModel, decode_work
from vibe_sgl_lite.scheduler.request import Request

MARGIN = 1.25  # a draft must bring so many times what a token more costs: estimates err
GAIN = 1.08  # and a step with drafts so many times the tokens a second
SIZES = (1, 3, 7)  # rooms to choose from, and the most that there may be
TRY = 3  # room of a try, and the first one
SHARE, CREDIT, MOST_CREDIT = 0.004, 1.0, 4.0  # of the accounts: paid in a step, at first, at most
FADE = 0.9  # weight of a row's past drafts with each step that has some
FOUND_FADE = 0.7  # of whether any were proposed
IN_FLIGHT = 4  # steps, more than there ever are
KNOWN, KEPT = 4, 15  # steps without drafts before any has some, and those whose time is remembered
BEHIND = 3  # steps behind one with drafts, which may take longer for it: ranks wait, and send what has changed
PAUSE = 8  # from a try that brought nothing to the next, and of steps without drafts to see anew what these take
FIRST_RUN, LONGEST_RUN = 16, 1024  # steps with drafts between two such pauses: twice as many each time


class DraftPlan(NamedTuple):
    """rooms: of each decode row. size: what their most is counted as. tries: to learn what they yield."""

    rooms: list[int]
    size: int
    tries: bool = False


class _Median:
    """Of what came last; something else takes time too, now and then much."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=KEPT)
        self.value = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        self._values.append(value)
        self.value = sorted(self._values)[len(self._values) // 2]


class Speculation:
    """Plans, and counts. drafts: rows that had some; draft_tokens: their drafts; accepted_tokens: those that held."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self._most = config.draft_tokens
        self._budget = config.draft_budget
        self._cost = cost
        self._step = self._wait_until = 0
        self._ends_early = False
        self._found, self._probability = 0.5, 0.5  # a new request's
        self._plain: dict[int, _Median] = {}  # seconds of steps without drafts, by their rows
        self._slower: dict[tuple[int, int], _Median] = {}  # and multiples of them with, by rows and size
        self._after: tuple[_Median, ...] = tuple(_Median() for _ in range(BEHIND))  # multiples of the steps behind
        self._accounts = {False: CREDIT, True: CREDIT}  # by whether it tries
        self._since, self._tried = BEHIND, False  # steps since the last one with drafts, and whether that tried
        self._run, self._longest_run = 0, FIRST_RUN
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def plan(self, requests: Collection[Request]) -> DraftPlan | None:
        """Rooms in the next step, of these rows alone; None: nobody drafts."""
        self._step += 1
        rows = len(requests)
        most = min(self._most, self._budget // rows) if rows else 0
        if most == 0 or self._step < self._wait_until or max(self._accounts.values()) <= 0.0:
            return None
        plain = self._plain.get(_group(rows))
        if self._cost.measured and (plain is None or len(plain) < KNOWN):
            return None  # first what a step takes without
        context = sum(request.num_computed_tokens for request in requests)
        seconds = self._cost.seconds(decode_work(rows, rows + context)) if plain is None else plain.value
        token = self._cost.one_more(context // rows) / seconds if seconds > 0.0 else 1.0
        if MARGIN * token * rows >= 1.0:
            return None
        plan = self._best(requests, most, token) if self._accounts[False] > 0.0 else None
        plan = self._with_tries(plan, rows, most, token) if self._accounts[True] > 0.0 else plan
        if plan is None:
            self._pause(1 + rows // 8, until_known=False)  # looking costs time too
        elif self._cost.measured and plan.tries:
            self._pause(PAUSE, until_known=True)
        elif self._cost.measured:
            self._run += 1
            if not any(size == plan.size for _, size in self._slower):
                self._pause(IN_FLIGHT, until_known=True)
            elif self._run >= self._longest_run:
                self._pause(PAUSE, until_known=False)
                self._run, self._longest_run = 0, min(2 * self._longest_run, LONGEST_RUN)
        return plan

    def _pause(self, steps: int, *, until_known: bool) -> None:
        """Nobody drafts in so many; or until it is known what those with drafts took, and that they brought any."""
        self._wait_until, self._ends_early = self._step + steps, until_known

    def _best(self, requests: Collection[Request], most: int, token: float) -> DraftPlan | None:
        """What gains most, if anything does. token: what one more takes, of a step without drafts."""
        rows, least = len(requests), MARGIN * token * len(requests)
        chances = [self._chance(request, least, most) for request in requests]
        best, best_value = None, GAIN
        for size in self._sizes(most):
            tokens, drafts = float(rows), 0
            for found, p, most_room in chances:
                room = min(size, most_room)
                tokens += found * _yield(p, room)
                drafts += room
            value = tokens / rows / self._multiple(rows, size, 1.0 + drafts * token)
            if value > best_value:
                best, best_value = size, value
        if best is None:
            return None
        return DraftPlan([min(best, room) for _, _, room in chances], best)

    def _with_tries(self, plan: DraftPlan | None, rows: int, most: int, token: float) -> DraftPlan | None:
        """All rows try if nobody gains, or those that rest, beside the others."""
        room = min(TRY, most)
        if plan is None:
            return DraftPlan([room] * rows, room, tries=True)
        resting = plan.rooms.count(0)
        if resting:
            room = min(TRY, plan.size)
            self._accounts[True] -= resting * room * token
            return plan._replace(rooms=[one or room for one in plan.rooms])
        return plan

    def _chance(self, request: Request, least: float, most: int) -> tuple[float, float, int]:
        """How likely something is proposed, and that a draft of it holds; and what a row may have room for."""
        if request.draft_found < 0.0:
            request.draft_found = self._found
            request.draft_hits, request.draft_misses = 2 * self._probability, 2 * (1 - self._probability)
        p = request.draft_hits / (request.draft_hits + request.draft_misses)
        if p < least:
            return request.draft_found, p, 0
        if p >= 1.0 or least <= 0.0:
            return request.draft_found, p, most
        return request.draft_found, p, min(most, int(math.log(least) / math.log(p)))

    def _sizes(self, most: int) -> Sequence[int]:
        """To choose from: up to the next one after the largest of which it is known what it takes."""
        sizes = [*(size for size in SIZES if 3 * size <= 2 * most), most]
        if not self._cost.measured:
            return sizes
        known = max((size for _, size in self._slower), default=0)
        bound = next((size for size in sizes if size > known and size >= TRY), most)
        return [size for size in sizes if size <= bound]

    def _multiple(self, rows: int, size: int, guess: float) -> float:
        """Of what a step without drafts takes; of the nearest number of rows of which it is known."""
        group = _group(rows)
        near = [(abs(known - group), mean.value) for (known, other), mean in self._slower.items() if other == size]
        if near:
            return min(near)[1]
        return max([guess, *(mean.value for (_, other), mean in self._slower.items() if other < size)])

    def observe_step(self, rows: int, seconds: float, plan: DraftPlan | None, accepted: int) -> None:
        """A step of so many decode rows alone took so long; so many of its drafts held in all."""
        if seconds <= 0.0 or self._most == 0:
            return
        for tries in self._accounts:
            self._accounts[tries] = min(self._accounts[tries] + SHARE, MOST_CREDIT)
        group, behind = _group(rows), self._since
        self._since = 0 if plan is not None else min(behind + 1, BEHIND)
        plain = self._plain.setdefault(group, _Median())
        if plan is None and behind >= BEHIND:
            plain.add(seconds)
        if len(plain) < KNOWN:
            return
        multiple = seconds / plain.value
        if plan is not None:
            self._tried = plan.tries
            slower = self._slower.setdefault((group, plan.size), _Median())
            slower.add(multiple)
            self._book(accepted / rows + 1.0 - slower.value, tries=plan.tries)
            if self._ends_early and (accepted or not plan.tries):
                self._wait_until = 0
        elif behind < BEHIND:
            self._after[behind].add(multiple)
            self._book(min(1.0 - self._after[behind].value, 0.0), tries=self._tried)

    @property
    def multiples(self) -> dict[str, float]:
        """What steps with drafts take, of those without: by rows and size of room."""
        return {f"{rows} x {size}": round(mean.value, 2) for (rows, size), mean in sorted(self._slower.items())}

    def _book(self, gain: float, *, tries: bool) -> None:
        self._accounts[tries] = min(self._accounts[tries] + gain, MOST_CREDIT)
        if not tries and self._accounts[tries] <= 0.0:
            self._longest_run = FIRST_RUN

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A row with room had so many drafts, of which so many held."""
        found = float(drafted > 0)
        request.draft_found += (1 - FOUND_FADE) * (found - max(request.draft_found, 0.0))
        self._found += (1 - FADE) / 4 * (found - self._found)
        if drafted == 0:
            return
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        missed = int(accepted < drafted)
        request.draft_hits = FADE * request.draft_hits + accepted
        request.draft_misses = FADE * request.draft_misses + missed
        self._probability += (1 - FADE) / 4 * (accepted / (accepted + missed) - self._probability)


def _group(rows: int) -> int:
    """Numbers of rows that count as one: all up to 7, then by their first three binary digits."""
    shift = max(0, rows.bit_length() - 3)
    return rows >> shift << shift


def _yield(p: float, room: int) -> float:
    """Tokens that so many drafts bring."""
    return float(room) if p >= 1.0 else p * (1.0 - p**room) / (1.0 - p)
