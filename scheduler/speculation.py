"""For how many drafts each decode row has room: as many as gain time, by what steps with and without were seen to take.

The ranks propose drafts and check them (`ForwardBatch`). Of each request it is known how often something was proposed,
and how likely a draft holds, given those before it: with p, room for k yields p + p^2 + ... + p^k tokens more.
What a step with room takes is measured, for each number of rows and size of room, as a multiple of one without: how
it grows depends on the device, its kernels and what proposes. It is measured apart where nothing was proposed: on a CPU
such a step takes hardly longer. Of some sizes that one is taken that yields most tokens a second, what it costs
counted with a margin, if these are more than without any. A row's room ends where the next draft brings less than a
token more in a step costs by the cost model.

Estimates err and texts change, so nothing is risked but what an account allows. Its unit is a step without drafts. Each
step pays in a small share of one; a step with drafts books what it gained or lost: tokens more, and time more.
What should gain draws on one account, and stops while that is overdrawn. The other one is for trying anew what did not
gain, all rows at once. So a load that never gains loses that share and the first credit; where trying costs nearly
nothing, it is done nearly always. Something else may take a step's time, several in a row too. So a step is booked as
such steps typically take, and as long as few of a kind have been seen, at most a step; what was booked too high then
is given back as more are seen.

Depends on nothing but its inputs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple

from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.cost import CostModel, decode_work
from vibe_sgl_lite.scheduler.request import Request

MARGIN = 1.25  # drafts must bring so many times what they cost: estimates err
SIZES = (1, 3, 7)  # rooms to choose from, and the most that there may be
TRY = 3  # room of a try, and the first one
SHARE, CREDIT, MOST_CREDIT = 0.003, 0.5, 4.0  # of the accounts: paid in a step, at first, at most
FADE = 0.9  # weight of a row's past drafts with each step that has some
LEAST = 0.05  # of a step: what one with drafts costs beside what is measured, such as the scheduler's time
KNOWN, KEPT = 6, 25  # steps from which on it is known well, those without drafts; and those that are remembered
BEHIND = 3  # steps behind one with drafts, which may take longer for it: ranks wait, and send what has changed
LOOK = BEHIND + 3  # steps without drafts to see anew what these take, or to hear what those with some did
FIRST_RUN, LONGEST_RUN = 32, 1024  # steps with drafts between two such pauses: twice as many each time


class Kind(IntEnum):
    """Of steps with room: nothing was proposed; or something, by all that had to be made up for first; or once more."""

    NOTHING = 0
    FIRST = 1
    MORE = 2


class DraftPlan(NamedTuple):
    """rooms: of each decode row. size: what their most is counted as. tries: to learn what they yield."""

    rooms: list[int]
    size: int
    tries: bool = False


class _Typical:
    """What the last values were like: the one in their middle, of two the lower. Of steps: seconds, or multiples."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=KEPT)
        self.add = self._values.append
        self._excess = 0.0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def value(self) -> float:
        return sorted(self._values)[(len(self._values) - 1) // 2]

    @property
    def longest(self) -> float:
        return max(self._values)

    def price(self, multiple: float, noise: float) -> float:
        """Add one; what it costs over 1, less what those before it were charged too much by what is known now. noise:
        what steps without drafts may take by chance: of few steps no more is believed, but for a second 1."""
        before, few = self._excess, len(self) if len(self) < KNOWN else 0
        self.add(multiple)
        value = self.value
        believed = value if len(self) >= KNOWN or value > noise else min(value, 2.0)
        self._excess = max(0.0, believed - 1.0)
        return self._excess - few * max(before - self._excess, 0.0)


class Speculation:
    """Plans, and counts. drafts: rows that had some; draft_tokens: their drafts; accepted_tokens: those that held."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self._most = config.draft_tokens
        self._budget = config.draft_budget
        self._cost = cost
        self._step = self._wait_until = self._unpaid = 0
        self._ends_early = False
        self._found, self._probability = 0.5, 0.5  # a new request's
        self._plain: dict[int, _Typical] = {}  # seconds of steps without drafts, by their rows
        self._slower: dict[tuple[int, int, Kind], _Typical] = {}  # and multiples of them with, by rows and size
        self._after: tuple[_Typical, ...] = tuple(_Typical() for _ in range(BEHIND))  # multiples of the steps behind
        self._accounts = {False: CREDIT, True: CREDIT}  # by whether it tries
        self._since, self._tried = BEHIND, False  # steps since the last one with drafts, and whether that tried
        self._run, self._longest_run = 0, FIRST_RUN
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def plan(self, requests: Collection[Request]) -> DraftPlan | None:
        """Rooms in the next step, of these rows alone; None: nobody drafts."""
        self._step += 1
        if self._step < self._wait_until:
            return None
        self._pay()
        richer, rows = max(self._accounts.values()), len(requests)
        most = min(self._most, self._budget // rows) if rows else 0
        if richer <= 0.0:
            self._pause(1 + int(-richer / SHARE), until_known=True)  # or until a step that is on its way has gained
            return None
        if most == 0:
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
            self._pause(LOOK, until_known=False)  # looking costs time too, and little changes meanwhile
        elif self._cost.measured:
            self._run += 1
            if plan.tries or plan.size > self._known_size:
                self._pause(LOOK, until_known=True)
            elif self._run >= self._longest_run:
                self._pause(LOOK, until_known=False)
                self._run, self._longest_run = 0, min(2 * self._longest_run, LONGEST_RUN)
        return plan

    def _pause(self, steps: int, *, until_known: bool) -> None:
        """Nobody drafts in so many; or until it is known what those with drafts took."""
        self._wait_until, self._ends_early = self._step + steps, until_known

    def _best(self, requests: Collection[Request], most: int, token: float) -> DraftPlan | None:
        """What gains most, if anything does. token: what one more takes, of a step without drafts."""
        rows, least = len(requests), MARGIN * token * len(requests)
        chances = [self._chance(request, least, most) for request in requests]
        if sum(found * _yield(p, room) for found, p, room in chances) <= LEAST * rows:
            return None
        nothing = math.prod(1.0 - found for found, _, _ in chances)
        best, best_value = None, 1.0
        for size in self._sizes(most):
            gain, drafts = 0.0, 0
            for found, p, most_room in chances:
                room = min(size, most_room)
                gain += found * _yield(p, room) / rows
                drafts += room
            cost = (1.0 - nothing) * (self._multiple(rows, size, Kind.MORE, 1.0 + drafts * token) - 1.0)
            cost += nothing * (self._multiple(rows, size, Kind.NOTHING, 1.0) - 1.0)
            value = (1.0 + gain) / (1.0 + MARGIN * max(cost, 0.0))
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
        bound = next((size for size in sizes if size > self._known_size and size >= TRY), most)
        return [size for size in sizes if size <= bound]

    @property
    def _known_size(self) -> int:
        return max((size for _, size, kind in self._slower if kind is not Kind.NOTHING), default=0)

    def _multiple(self, rows: int, size: int, kind: Kind, guess: float) -> float:
        """Of what a step without drafts takes; of the nearest number of rows of which it is known."""
        group = _group(rows)
        exact = self._slower.get((group, size, kind))
        if exact is not None:
            return exact.value
        known = [
            (abs(near - group), other, typical.value)
            for (near, other, of), typical in self._slower.items()
            if of is kind
        ]
        of_size = [(near, value) for near, other, value in known if other == size]
        if of_size:
            return min(of_size)[1]
        return max([guess, *(value for _, other, value in known if other < size)])

    def observe_step(self, rows: int, seconds: float, plan: DraftPlan | None, drafted: int, accepted: int) -> None:
        """A step of so many decode rows alone took so long; so many drafts were in it, of which so many held."""
        if seconds <= 0.0 or self._most == 0:
            return
        self._unpaid += 1
        group, behind = _group(rows), self._since
        self._since = 0 if plan is not None else behind + 1
        plain = self._plain.get(group)
        if plain is None:
            plain = self._plain[group] = _Typical()
        if plan is None and behind >= BEHIND:
            plain.add(seconds)
            return
        if len(plain) < KNOWN:
            return
        usual = plain.value
        multiple, noise = seconds / usual, plain.longest / usual
        if plan is not None:
            self._tried = plan.tries
            kind = Kind.NOTHING if drafted == 0 else Kind.FIRST if behind >= BEHIND else Kind.MORE
            slower = self._slower.get((group, plan.size, kind))
            if slower is None:
                slower = self._slower[group, plan.size, kind] = _Typical()
            self._book(accepted / rows - slower.price(multiple, noise) - LEAST, tries=plan.tries)
            if self._ends_early:
                self._wait_until = 0
        else:
            self._book(-self._after[behind].price(multiple, noise), tries=self._tried)

    @property
    def multiples(self) -> dict[str, float]:
        """What steps with drafts take, of those without: by rows and size of room."""
        return {
            f"{rows} x {size} {kind.name.lower()}": round(typical.value, 2)
            for (rows, size, kind), typical in sorted(self._slower.items())
        }

    def _pay(self) -> None:
        """The share of each step that there was since."""
        for tries in self._accounts:
            self._accounts[tries] = min(self._accounts[tries] + SHARE * self._unpaid, MOST_CREDIT)
        self._unpaid = 0

    def _book(self, gain: float, *, tries: bool) -> None:
        self._pay()
        self._accounts[tries] = min(self._accounts[tries] + gain, MOST_CREDIT)
        if not tries and self._accounts[tries] <= 0.0:
            self._longest_run = FIRST_RUN

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A row with room had so many drafts, of which so many held."""
        found = float(drafted > 0)
        request.draft_found += (1 - FADE) * (found - max(request.draft_found, 0.0))
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
