"""The cost model finds what steps cost, and chunks beside running rows follow it."""

from __future__ import annotations

import random

import pytest

from runtime.messages import StepResult
from scheduler.cost import CostModel, chunk_context
from tests.scheduler.harness import Harness, config, request


def test_it_learns_the_three_numbers() -> None:
    base, token, context = 0.05, 0.003, 1e-6
    rng = random.Random(0)
    cost = CostModel(16.0)
    for _ in range(400):
        tokens = rng.choice([1, 8, 64, 512])
        total = tokens * rng.randrange(1, 4000)
        cost.observe(tokens, total, (base + token * tokens + context * total) * rng.uniform(0.95, 1.05))
    for tokens, total in ((1, 100), (16, 16_000), (512, 512 * 3000)):
        assert cost.seconds(tokens, total) == pytest.approx(base + token * tokens + context * total, rel=0.08)


def test_it_forgets_what_steps_used_to_cost() -> None:
    cost = CostModel(16.0)
    for seconds in (0.5, 0.01):
        for step in range(500):
            cost.observe(8, 800 + step, seconds)
    assert cost.seconds(8, 1000) == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("context", [0, 100, 30_000])
def test_tokens_within_a_budget(context: int) -> None:
    cost = CostModel(16.0)
    for budget in (0.5, 10, 1000):
        count = cost.tokens_within(budget, context)
        spent = cost.seconds(count, chunk_context(context, count)) - cost.seconds(0, 0)
        one_more = cost.seconds(count + 1, chunk_context(context, count + 1)) - cost.seconds(0, 0)
        assert spent <= budget * 1.01
        assert one_more >= budget * 0.99


def test_chunks_shrink_beside_running_rows_and_with_their_context() -> None:
    """A prompt of 3,000 tokens beside 4 decode rows: no step longer than 4 decode steps, once steps are measured."""
    token, base, context = 1.0, 20.0, 1 / 1000
    h = Harness(config(num_pages=2000, page_size=4, chunked_prefill_size=512, overlap=False))

    def step() -> tuple[int, float]:
        batch = h.scheduler.schedule(h.now)
        assert batch is not None
        planned = h.scheduler.newest_step
        assert planned is not None
        seconds = base + token * planned.tokens + context * planned.context
        result = h.rank.run(batch)
        h._take(h.scheduler.complete(StepResult(result.step, result.token_ids, total_s=seconds), h.now))
        return planned.tokens - len(planned.decode), seconds

    for uid in range(4):
        h.add(request(uid, [uid] * 20, max_new_tokens=400))
    assert step()[0] == 80
    for _ in range(30):
        decode_s = step()[1]
    h.add(request(9, [5, 6] * 1500, max_new_tokens=5))
    chunks, times = zip(*(step() for _ in range(200)), strict=True)
    running = [c for c in chunks if c]
    assert sum(running) == 3000
    assert max(times[5:]) < 4 * decode_s
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
