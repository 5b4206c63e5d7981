"""Room for drafts: as many as pay, by their past and their cost."""

import random

import msgspec
import pytest

from tests.scheduler.fake_rank import reference as reference_tokens
from tests.scheduler.harness import Harness, config, request, sampling
from vibe_sgl_lite.runtime.messages import StepResult, pack_ids, unpack_ids
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.cost import CostModel, Work, decode_work
from vibe_sgl_lite.scheduler.request import Request, samples_of
from vibe_sgl_lite.scheduler.speculation import (
    CREDIT,
    KEPT,
    KNOWN,
    MARGIN,
    SHARE,
    DraftPlan,
    Speculation,
)


def rows(count: int) -> list[Request]:
    made = [samples_of(request(uid, [1] * 100, max_new_tokens=1000), uid, 0.0)[0] for uid in range(count)]
    for one in made:
        one.num_computed_tokens = 100
    return made


def cost_of(base: float, a_token: float) -> CostModel:
    """As learned of steps that take so long."""
    cost, rng = CostModel(16.0), random.Random(0)
    for _ in range(300):
        tokens = rng.randint(1, 64)
        cost.observe(decode_work(tokens, 100 * tokens), base + a_token * tokens)
    return cost


def rooms(speculation: Speculation, requests: list[Request]) -> list[int]:
    plan = speculation.plan(requests)
    return [0] * len(requests) if plan is None else plan.rooms


class Device:
    """Runs steps as a rank does, two in flight. plain: seconds without drafts; slower: multiples with so much room;
    noise: of all times, of which every 20th is some times as long; behind: what the steps behind one with drafts take
    longer; idle: the multiple where nothing is proposed, if another; outliers: how many times as long, at most; first:
    what a step with drafts takes longer that comes behind some without, as a multiple."""

    def __init__(
        self, rows: int, plain: float, slower: dict[int, float], noise: float = 0.05, behind: tuple[float, ...] = (),
        idle: float | None = None, outliers: float = 3.0, first: float = 0.0,
    ):  # fmt: skip
        self.rows, self.plain, self.slower, self.noise, self.behind = rows, plain, slower, noise, behind
        self.idle, self.outliers, self.first = idle, outliers, first

    def serve(
        self, speculation: Speculation, requests: list[Request], holds: dict[int, float], steps: int, seed: int = 0,
        found: float = 1.0,
    ) -> float:  # fmt: skip
        """Seconds a token, over those without drafts. holds: by uid, how likely a draft is right; below 0: none is
        ever proposed; found: else so often."""
        rng, seconds, tokens = random.Random(seed), 0.0, 0
        flying: list[tuple[DraftPlan | None, list[int], float, float]] = []
        since = 100
        for _ in range(steps):
            plan = speculation.plan(requests)
            took, drafts = self.plain, [0] * len(requests)
            if plan is not None:
                for row, (request, room) in enumerate(zip(requests, plan.rooms, strict=True)):
                    drafts[row] = room if holds[request.uid] >= 0 and rng.random() < found else 0
                slower = next(value for size, value in sorted(self.slower.items()) if size >= max(plan.rooms))
                slower += self.first if since >= 3 else 0.0
                took *= slower if self.idle is None or any(drafts) else self.idle
            elif since < len(self.behind):
                took += self.behind[since]
            since = 0 if plan is not None else since + 1
            shown = took * rng.uniform(1 - self.noise, 1 + self.noise)
            shown *= rng.uniform(2.0, self.outliers) if rng.random() < 0.05 else 1.0
            flying.append((plan, drafts, took, shown))
            if len(flying) == 2:
                plan, drafts, took, shown = flying.pop(0)
                accepted = 0
                for request, room, drafted in zip(requests, plan.rooms if plan else (), drafts, strict=False):
                    if room:
                        p = holds[request.uid]
                        kept = next((i for i in range(drafted) if rng.random() >= p), drafted)
                        speculation.observe(request, drafted, kept)
                        accepted += kept
                speculation.observe_step(len(requests), shown, plan, sum(drafts), accepted)
                seconds += took
                tokens += len(requests) + accepted
        return seconds / tokens / (self.plain / self.rows)


# As an H100 took them at the 0.6B shape, and dearer; a CPU.
DEVICES = {
    "one row": Device(1, 0.0007, {1: 1.5, 3: 1.6, 7: 1.9, 12: 2.3}, behind=(0.0003,)),
    "one cheap row": Device(1, 0.0007, {1: 1.2, 3: 1.2, 7: 1.3, 12: 1.4}, behind=(0.0001,)),
    "eight rows": Device(8, 0.0014, {1: 1.2, 3: 1.4, 8: 1.7}),
    "64 rows": Device(64, 0.0035, {1: 1.4}),
    "a slow host": Device(1, 0.0004, {12: 1.05}, noise=0.3, behind=(0.0002, 0.0001, 0.0001)),
    "a CPU": Device(1, 0.05, {1: 1.03, 3: 1.08, 7: 1.2, 12: 1.4}, noise=0.3),
    "a draft model": Device(1, 0.004, {1: 1.5, 3: 1.8, 7: 2.4, 12: 3.2}, behind=(0.0005,), first=2.0),
    "a small model": Device(1, 0.0014, {1: 1.25, 3: 1.36, 7: 1.5, 12: 1.6}, noise=0.1, idle=1.02, outliers=10.0),
}


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        (name, holds)
        for name in DEVICES
        for holds in (-1.0, 0.0, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0)
        if (name, holds) != ("a draft model", -1.0)  # which always proposes something
    ],
)
def test_nothing_is_lost_where_drafts_do_not_hold(name: str, holds: float) -> None:
    """Of 256 steps, in which all is to be learned, and of many, in the mean of some lives."""
    device = DEVICES[name]
    for steps, most in ((256, 1.02), (600, 1.016)):
        took = []
        for seed in range(3 if device.rows == 1 else 1):
            speculation = Speculation(config(draft_tokens=12), cost_of(device.plain, device.plain / 1000))
            requests = rows(device.rows)
            took.append(device.serve(speculation, requests, dict.fromkeys(range(device.rows), holds), steps, seed))
        assert sum(took) / len(took) < most


@pytest.mark.parametrize(
    ("name", "holds", "most"),
    [
        ("one row", 0.7, 0.9), ("one row", 0.9, 0.6), ("one row", 1.0, 0.35), ("one cheap row", 0.5, 0.75),
        ("eight rows", 0.7, 0.75), ("eight rows", 1.0, 0.3), ("64 rows", 0.7, 0.9), ("a CPU", 0.5, 0.7),
        ("a CPU", 0.9, 0.3), ("a draft model", 0.9, 0.75), ("a small model", 0.5, 0.85), ("a small model", 0.9, 0.3),
    ],
)  # fmt: skip
def test_what_holds_gains(name: str, holds: float, most: float) -> None:
    device, took = DEVICES[name], []
    for seed in range(3 if device.rows < 64 else 1):
        speculation = Speculation(config(draft_tokens=12), cost_of(device.plain, device.plain / 1000))
        of_all = dict.fromkeys(range(device.rows), holds)
        took.append(device.serve(speculation, rows(device.rows), of_all, 400, seed))
    assert sum(took) / len(took) < most


def test_who_begins_to_repeat_itself_is_found() -> None:
    device = DEVICES["one row"]
    speculation = Speculation(config(draft_tokens=12), cost_of(device.plain, device.plain / 1000))
    requests = rows(1)
    assert device.serve(speculation, requests, {0: 0.0}, 3000) < 1.012
    assert device.serve(speculation, requests, {0: 0.95}, 2000) < 0.6


def test_drafts_that_hold_get_company_and_others_none() -> None:
    device = Device(8, 0.05, {1: 1.1, 3: 1.3, 8: 1.5})
    speculation = Speculation(config(draft_tokens=8), cost_of(0.05, 0.0012))
    requests = rows(8)
    assert device.serve(speculation, requests, {uid: 1.0 if uid % 2 else 0.0 for uid in range(8)}, 400) < 0.6
    given = [rooms(speculation, requests) for _ in range(40)]
    assert {tuple(row[1::2]) for row in given} == {(8, 8, 8, 8)}
    assert sum(row[0::2] == [0, 0, 0, 0] for row in given) > 30  # else they try


def test_a_room_ends_where_a_draft_costs_more_than_it_brings() -> None:
    """Half of the drafts hold: the last one brings its cost, with a margin; one more would not."""
    speculation, token = Speculation(config(draft_tokens=20), cost_of(0.05, 0.002)), 0.002
    for _ in range(KNOWN):
        speculation.observe_step(1, 0.052, None, 0, 0)
    (one,) = rows(1)
    for size in (3, 3, 7, 7):
        (room,) = rooms(speculation, [one])
        speculation.observe_step(1, 0.055, DraftPlan([room], size), room, room)
    (room,) = rooms(speculation, [one])
    assert 0.5**room * 0.052 > MARGIN * token > 0.5 ** (room + 1) * 0.052


def test_nobody_drafts_where_computing_takes_the_time() -> None:
    assert Speculation(config(draft_tokens=10), cost_of(0.001, 0.02)).plan(rows(4)) is None
    for count, a_token, drafts in ((1, 0.002, True), (48, 0.01, False)):
        speculation = Speculation(config(draft_tokens=10, draft_budget=1000), cost_of(0.05, a_token))
        for _ in range(KNOWN):
            speculation.observe_step(count, 0.05 + count * a_token, None, 0, 0)
        assert (speculation.plan(rows(count)) is not None) == drafts


@pytest.mark.parametrize("count", [1, 5, 64, 65])
def test_a_step_has_no_more_drafts_than_its_budget(count: int) -> None:
    speculation = Speculation(config(draft_tokens=3, draft_budget=64), cost_of(1.0, 1e-6))
    for _ in range(KNOWN):
        speculation.observe_step(count, 1.0, None, 0, 0)
    assert rooms(speculation, rows(count)) == [min(3, 64 // count)] * count


def test_steps_that_become_slower_are_seen() -> None:
    """Else a step with drafts would be charged with what all take now: these bring a token more, and gain."""
    speculation = Speculation(config(draft_tokens=1), cost_of(0.01, 1e-5))
    for seconds, steps in ((0.01, 1000), (0.03, KEPT)):
        for _ in range(steps):
            speculation.observe_step(1, seconds, None, 0, 0)
    for _ in range(KNOWN):
        speculation.observe_step(1, 0.033, DraftPlan([1], 1), 1, 1)
    assert speculation.multiples["1 x 1 more"] == 1.1


def test_a_plan_that_may_cost_nothing_more_rests_until_it_may() -> None:
    """Steps that cost five times as much and bring nothing: some, then none for as long as the shares take."""
    speculation = Speculation(config(draft_tokens=3), cost_of(0.01, 1e-5))
    (one,), plans = rows(1), 0
    for _ in range(3000):
        plan = speculation.plan([one])
        plans += plan is not None
        speculation.observe_step(1, 0.01 if plan is None else 0.05, plan, 3 if plan else 0, 0)
        if plan is not None:
            speculation.observe(one, 3, 0)
    assert 2 <= plans <= (2 * CREDIT + 2 * SHARE * 3000) / 4 + 4


def test_a_new_request_begins_with_what_others_have_seen() -> None:
    device = DEVICES["a CPU"]
    speculation = Speculation(config(draft_tokens=10), cost_of(device.plain, device.plain / 1000))
    one, late = rows(2)
    device.serve(speculation, [one], {0: 1.0}, 200)
    assert rooms(speculation, [late]) == [10]


def test_a_step_counts_as_what_was_run() -> None:
    """A rank that finds nothing to propose runs decode rows. The cost model sees steps without room alone, as it is
    what those with room are compared with."""
    scheduler = Scheduler(config(draft_tokens=4, overlap=False, base_tokens=1000.0))
    scheduler.add(request(1, [1, 2, 3], max_new_tokens=50), 0.0)
    seen: list[Work] = []
    observe = scheduler.cost.observe
    scheduler.cost.observe = lambda work, seconds: seen.append(work) or observe(work, seconds)  # type: ignore
    planned: list[list[int]] = []
    steps = [([7], 0), *(([8], 0) for _ in range(KNOWN)), ([9], 0), ([10, 11], 3), ([12], 1)]
    for step, (tokens, drafted) in enumerate(steps):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        planned.append(unpack_ids(batch.row_tokens) if batch.row_tokens is not None else planned[-1])
        scheduler.complete(
            StepResult(
                step, pack_ids(tokens), counts=pack_ids([len(tokens)]), total_s=0.1,
                drafted=pack_ids([drafted]) if drafted else b"",
            ), 0.0,
        )  # fmt: skip
    assert planned == [[3], *([[1]] * KNOWN), [5], [5], [5]]
    assert seen == [Work(3, 6, 3), *(Work(1, 4 + at, 4 + at) for at in range(KNOWN))]
    stats = scheduler.stats()
    assert (stats["drafts_total"], stats["draft_tokens_total"], stats["accepted_tokens_total"]) == (2, 4, 1)


@pytest.mark.parametrize("counted", [False, True], ids=["as a CPU tells it", "as a GPU does"])
def test_room_that_nothing_was_proposed_for_leaves_a_plain_step(counted: bool) -> None:
    """Step by step the same outputs, in the form in which a token costs least, and as many pages left; one request ends
    at its length, one at an end token."""
    told = []
    for most in (0, 4):
        scheduler = Scheduler(config(draft_tokens=most, base_tokens=1000.0, page_size=4, num_pages=40, overlap=False))
        scheduler.add(request(1, [1, 2, 3], max_new_tokens=9), 0.0)
        scheduler.add(request(2, [4, 5, 6], max_new_tokens=30, stop_token_ids=(50,)), 0.0)
        seen: list[object] = []
        rows, with_room = list[int](), 0
        while (batch := scheduler.schedule(0.0)) is not None:
            rows = rows if batch.row_tokens is None else unpack_ids(batch.row_tokens)
            with_room += max(rows) == 5
            ids = [30 + batch.step] * len(rows)
            result = StepResult(batch.step, pack_ids(ids), total_s=0.0)
            if counted and most:
                result = msgspec.structs.replace(
                    result, counts=pack_ids([1] * len(ids)), drafted=pack_ids([0] * len(ids))
                )
            outputs = scheduler.complete(result, 0.0)
            ended = [(one.uid, one.token_ids, one.finish) for one in outputs.tokens]
            seen.append((sorted(outputs.next_tokens), sorted(ended), scheduler.state.memory.spare))
        assert (with_room > 5) == (most > 0)
        told.append(seen)
    assert told[0] == told[1]
    assert len(told[0]) == 21


def test_speculation_adapts_while_outputs_stay() -> None:
    h = Harness(config(draft_tokens=6, num_pages=200, base_tokens=500.0), seed=3)
    for uid in range(8):
        h.add(request(uid, [uid + 1, 2, 3], max_new_tokens=60))
    h.run()
    stats = h.scheduler.stats()
    assert int(stats["steps_total"]) < 60
    assert int(stats["accepted_tokens_total"]) > 50
    for uid in range(8):
        assert h.samples[uid].tokens == reference_tokens([uid + 1, 2, 3], sampling(max_new_tokens=60))
