"""The cost model finds what steps cost, and chunks beside running rows follow it."""

from __future__ import annotations

import random

import msgspec
import pytest

from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.scheduler.cost import CostModel, Work, chunk_work, decode_work


def test_it_learns_what_work_costs() -> None:
    base, token, context, read = 0.05, 0.003, 1e-6, 2e-5
    rng = random.Random(0)
    cost = CostModel(16.0)

    def truth(work: Work) -> float:
        return base + token * work.tokens + context * work.context + read * work.reads

    for _ in range(400):
        work = decode_work(8, 8 * rng.randrange(1, 4000))
        if rng.random() < 0.5:
            work += chunk_work(rng.randrange(4000), rng.choice([1, 8, 64, 512]))
        cost.seconds(work)  # as for every step: the fit moves a little each time
        cost.observe(work, truth(work) * rng.uniform(0.95, 1.05))
    for work in (decode_work(1, 100), decode_work(16, 16_000), chunk_work(3000, 512), chunk_work(3000, 8)):
        assert cost.seconds(work) == pytest.approx(truth(work), rel=0.1)


def test_it_forgets_what_steps_used_to_cost() -> None:
    cost = CostModel(16.0)
    for seconds in (0.5, 0.01):
        for step in range(500):
            cost.seconds(decode_work(8, 800 + step))
            cost.observe(decode_work(8, 800 + step), seconds)
    assert cost.seconds(decode_work(8, 1000)) == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("context", [0, 100, 30_000])
def test_tokens_within_a_budget(context: int) -> None:
    cost = CostModel(16.0)
    for budget in (0.5, 10, 1000):
        count = cost.tokens_within(budget, context)
        spent = cost.added(chunk_work(context, count)) if count else 0.0
        one_more = cost.added(chunk_work(context, count + 1))
        assert spent <= budget * 1.01
        assert one_more >= budget * 0.99


def test_a_long_prompt_does_not_wash_out_what_decoding_costs() -> None:
    """A thousand noisy steps with chunks of the size that the budget allows: the budget must not drift."""
    base, token, context, read = 0.003, 1e-4, 2e-8, 7e-7
    rng = random.Random(2)
    cost = CostModel(16.0)

    def run(work: Work) -> None:
        true = base + token * work.tokens + context * work.context + read * work.reads
        cost.observe(work, true * rng.lognormvariate(0.0, 0.4))

    for _ in range(100):
        before = cost.seconds(decode_work(8, 4000))
        run(decode_work(8, 4000))
    start = 0
    for _ in range(1000):
        budget = 2.5 * cost.seconds(decode_work(8, 4000))
        count = max(8, cost.tokens_within(budget, start))
        run(decode_work(8, 4000) + chunk_work(start, count))
        start = (start + count) % 16_000
    assert cost.seconds(decode_work(8, 4000)) == pytest.approx(before, rel=0.2)


def test_a_chunk_after_a_long_context_is_known_to_cost_its_reading() -> None:
    """Costs of an attention kernel that reads the KV of a chunk once: twice the tokens cost little more."""
    base, token, context, read = 1.0, 0.1, 2e-5, 5e-4
    rng = random.Random(1)
    cost = CostModel(16.0)
    for step in range(300):
        work = decode_work(8, 8000 + 8 * step)
        if step > 50:
            work += chunk_work(40 * step, rng.choice([8, 12, 16]))
        cost.seconds(work)
        seconds = base + token * work.tokens + context * work.context + read * work.reads
        cost.observe(work, seconds * rng.uniform(0.9, 1.1))
    few, many = cost.added(chunk_work(12_000, 8)), cost.added(chunk_work(12_000, 32))
    true_few = token * 8 + context * 8 * 12_000 + read * 12_000
    true_many = token * 32 + context * 32 * 12_000 + read * 12_000
    assert few == pytest.approx(true_few, rel=0.15)
    assert many == pytest.approx(true_many, rel=0.25)


@pytest.mark.parametrize("streamed", [(), (0,), (2,), (3,)])
def test_chunks_are_full_beside_rows_that_nobody_reads(streamed: tuple[int, ...]) -> None:
    """A prompt of 2,000 tokens beside 4 decode rows: only a stream among them keeps its pace."""
    settings = config(num_pages=2000, page_size=4, chunked_prefill_size=512, overlap=False)
    h = Harness(settings)

    def chunk() -> int:
        batch = h.scheduler.schedule(h.now)
        assert batch is not None
        planned = h.scheduler.newest_step
        assert planned is not None
        result = h.rank.run(batch)
        seconds = 20.0 + planned.work.tokens
        h._take(h.scheduler.complete(msgspec.structs.replace(result, total_s=seconds), h.now))
        return planned.work.tokens - len(planned.decode)

    for uid in range(4):
        h.add(request(uid, [uid] * 20, max_new_tokens=400, streamed=uid in streamed))
    assert chunk() == 80
    for _ in range(30):
        assert chunk() == 0
    h.add(request(9, [5, 6] * 1000, max_new_tokens=5))
    chunks = [chunk() for _ in range(3)]
    if streamed:
        assert 0 < max(chunks) < 100
    else:
        assert chunks == [512] * 3


@pytest.mark.parametrize("stretch", [3.0, 6.0])
def test_chunks_shrink_beside_running_rows_and_with_their_context(stretch: float) -> None:
    """A prompt of 3,000 tokens beside 4 decode rows: steps of so many decode steps or little more, once measured."""
    token, base, context = 1.0, 20.0, 1 / 1000
    settings = config(num_pages=2000, page_size=4, chunked_prefill_size=512, overlap=False, max_step_stretch=stretch)
    h = Harness(settings)

    def step() -> tuple[int, float]:
        batch = h.scheduler.schedule(h.now)
        assert batch is not None
        planned = h.scheduler.newest_step
        assert planned is not None
        seconds = base + token * planned.work.tokens + context * planned.work.context
        result = h.rank.run(batch)
        h._take(h.scheduler.complete(msgspec.structs.replace(result, total_s=seconds), h.now))
        return planned.work.tokens - len(planned.decode), seconds

    for uid in range(4):
        h.add(request(uid, [uid] * 20, max_new_tokens=400))
    assert step()[0] == 80
    for _ in range(30):
        decode_s = step()[1]
    h.add(request(9, [5, 6] * 1500, max_new_tokens=5))
    chunks, times = zip(*(step() for _ in range(200)), strict=True)
    running = [c for c in chunks if c]
    assert sum(running) == 3000
    assert max(times[5:]) < (stretch + 0.2) * decode_s
    assert max(times[5:]) > (stretch - 0.5) * decode_s
    assert running[-2] < running[3], "the longer the context, the smaller the chunk"

    for uid in range(4):
        h.abort(uid)
    h.add(request(10, [8, 9] * 700, max_new_tokens=1))
    while h.scheduler.state.requests.get(9):
        step()
    h.scheduler.state.memory.cache.evict(10_000)
    h.add(request(11, [10, 11] * 700, max_new_tokens=1))
    chunk, _ = step()
    assert chunk == 512, "with nothing decoding a chunk is full"


@pytest.mark.parametrize(
    ("fresh", "of_each", "expected"),
    [
        (8, 4, [[(2, 100)], [(2, 100)], [(2, 50), (3, 50)]]),
        (300, 150, [[(2, 150), (3, 150)], [(2, 100)], [(3, 100)]]),
        (400, 250, [[(2, 250), (3, 150)], [(3, 100)], []]),
    ],
)
def test_chunks_have_a_least_size_whatever_they_cost(
    fresh: int, of_each: int, expected: list[list[tuple[int, int]]]
) -> None:
    """All of a step's together; beyond that they get what the budget still has, which is nothing. The beginnings of
    prompts may have a larger one."""
    h = Harness(
        config(
            num_pages=2000, page_size=4, chunked_prefill_size=512, smallest_chunk=100, fresh_chunk=fresh,
            fresh_prompt=of_each, max_step_stretch=1.01,
        )
    )  # fmt: skip
    h.scheduler.cost.observe(decode_work(1, 21), 1.0)
    h.add(request(1, [1] * 20, max_new_tokens=400))
    assert h.schedule()
    for uid in (2, 3):
        h.add(request(uid, [uid] * 250, max_new_tokens=5))
    sizes = []
    for _ in range(3):
        assert h.schedule()
        step = h.scheduler.newest_step
        assert step is not None
        sizes.append([(chunk.request.uid, chunk.count) for chunk in step.chunks])
        h.complete()
    assert sizes == expected


def test_a_chunk_that_is_cut_makes_its_step_one_of_the_devices_sizes() -> None:
    """With all that decodes; a prompt's last chunk is as long as it is, and what is left over is not given to the next
    prompt if it takes the step beyond its size."""
    h = Harness(
        config(
            num_pages=2000, page_size=4, chunked_prefill_size=512, smallest_chunk=100, step_sizes=(32, 64, 96, 128),
            max_step_stretch=1.01,
        )
    )  # fmt: skip
    h.scheduler.cost.observe(decode_work(1, 21), 1.0)
    for uid in (1, 2, 3):
        h.add(request(uid, [uid] * 20, max_new_tokens=400))
    assert h.schedule()
    for uid in (4, 5, 6):
        h.add(request(uid, [uid] * 130, max_new_tokens=400))
    sizes = []
    for _ in range(5):
        assert h.schedule()
        step = h.scheduler.newest_step
        assert step is not None
        sizes.append((len(step.decode), [(chunk.request.uid, chunk.count) for chunk in step.chunks]))
        h.complete()
    assert sizes == [
        (3, [(4, 93)]),
        (3, [(4, 37), (5, 56)]),
        (4, [(5, 74), (6, 18)]),
        (5, [(6, 91)]),
        (5, [(6, 21)]),
    ]
