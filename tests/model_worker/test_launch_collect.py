"""The two halves of a step on a device that works in its own time: what is launched before what is collected."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from tests.model_worker.fake_device import Clock, FakeDevice, FakeGraphs, NothingIsRead, fake_compute
from tests.model_worker.test_model_runner import CONTEXT, PAGE, PAGES_A_SLOT, expected_tokens, new_slot, sampling
from tests.qwen3.harness import DENSE, load_model, make_checkpoint, random_tokens
from vibe_sgl_lite.model_worker.batch import DraftRow
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, IntArray
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.pending_step import PendingStep
from vibe_sgl_lite.model_worker.sampling import constraints as constraints_module
from vibe_sgl_lite.model_worker.sampling.slot_constraint import SlotConstraint
from vibe_sgl_lite.model_worker.sampling.slots import Filters
from vibe_sgl_lite.model_worker.step_pipeline import StepPipeline
from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.messages import FailedRow, ForwardBatch, RowAttributes, StepResult, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, ThinkingRules

LAUNCH_S, STEP_S = 1.0, 10.0
SLOTS = 8


class TimedRunner(ModelRunner):
    """Launching takes time of the host, and reads nothing back."""

    clock: Clock
    device: FakeDevice

    def launch(self, batch: ForwardBatch) -> PendingStep:
        self.clock.now += LAUNCH_S
        with NothingIsRead():
            return super().launch(batch)

    def collect(self, pending: PendingStep) -> StepResult:
        self.device.events.append(f"collect {pending.number}")
        return super().collect(pending)


def runner_on(model: Qwen3, device: FakeDevice, graphs: FakeGraphs | None = None) -> TimedRunner:
    pool = KVPool(model.config, 1, SLOTS * PAGES_A_SLOT, PAGE, model.dtype, model.device)
    runner = TimedRunner(model, pool, fake_compute(device, graphs), max_slots=SLOTS, context_length=CONTEXT)
    runner.clock = device.clock
    return runner


def decode_batches(prompt: list[int], count: int, params: ResolvedSampling | None = None) -> list[ForwardBatch]:
    first = ForwardBatch(
        0, new=[new_slot(0, prompt, params)], row_slots=pack_ids([0]), row_tokens=pack_ids([len(prompt)])
    )
    second = ForwardBatch(1, row_slots=pack_ids([0]), row_tokens=pack_ids([1]))
    return [first, second, *(ForwardBatch(number) for number in range(2, count))]


def tokens_of(results: list[StepResult]) -> list[int]:
    return [unpack_ids(result.token_ids)[0] for result in results]


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Any, Qwen3]:
    return make_checkpoint(tmp_path, DENSE), load_model(tmp_path)


def test_a_step_is_launched_before_the_one_before_it_is_collected(dense: tuple[Any, Qwen3]) -> None:
    reference, model = dense
    device = FakeDevice(Clock(), STEP_S)
    runner = runner_on(model, device)
    results: list[StepResult] = []
    pipeline = StepPipeline(runner, results.append)
    prompt = random_tokens(7)
    batches = decode_batches(prompt, 6)
    for batch in batches:
        pipeline.launch(batch)
    assert device.events == [
        "launch 0", "launch 1", "launch 2",
        "collect 0", "wait 0", "launch 3",
        "collect 1", "wait 1", "launch 4",
        "collect 2", "wait 2", "launch 5",
    ]  # fmt: skip
    assert device.busy_until == LAUNCH_S + 6 * STEP_S  # it never stood still
    device.clock.now = device.busy_until
    pipeline.collect_done()
    assert tokens_of(results) == expected_tokens(reference, prompt, 6)
    assert [result.step for result in results] == list(range(6))


def test_a_result_is_handed_on_when_it_is_there(dense: tuple[Any, Qwen3]) -> None:
    """Not when the next batch comes: that may wait for the result."""
    _, model = dense
    device = FakeDevice(Clock(), STEP_S)
    results: list[StepResult] = []
    pipeline = StepPipeline(runner_on(model, device), results.append)
    pipeline.launch(decode_batches(random_tokens(5), 1)[0])
    pipeline.collect_done()
    assert results == []
    device.clock.now = LAUNCH_S + STEP_S
    pipeline.collect_done()
    assert [result.step for result in results] == [0]


def test_a_moment_without_steps_is_idle(dense: tuple[Any, Qwen3], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = dense
    device = FakeDevice(Clock(), STEP_S)
    runner = runner_on(model, device)
    idle: list[None] = []
    monkeypatch.setattr(runner.pool, "idle", lambda: idle.append(None))
    pipeline = StepPipeline(runner, lambda _: None)
    pipeline.idle()
    assert len(idle) == 1
    pipeline.launch(decode_batches(random_tokens(5), 1)[0])
    pipeline.idle()
    assert len(idle) == 1
    device.clock.now = LAUNCH_S + STEP_S
    pipeline.collect_done()
    pipeline.idle()
    assert len(idle) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "seed": 5, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "seed": 6, "min_p": 0.05, "top_k": 200},
        {"temperature": 0.7, "seed": 6, "min_new_tokens": 3, "max_new_tokens": 8, "stop_token_ids": (4, 5), "top_k": 9},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {3: 2.0}},
        {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": True},
    ],
    ids=["greedy", "filtered", "unfiltered", "min-p", "held back", "adjusted", "logprobs"],
)
def test_two_in_flight_give_what_one_at_a_time_gives(dense: tuple[Any, Qwen3], fields: dict[str, Any]) -> None:
    _, model = dense
    prompt, params = random_tokens(9), sampling(**fields)

    def results_of(in_flight: int) -> list[StepResult]:
        device = FakeDevice(Clock(), STEP_S)
        runner, results, pending = runner_on(model, device), [], []
        for batch in decode_batches(prompt, 8, params):
            pending.append(runner.launch(batch))
            if len(pending) == in_flight:
                results.append(runner.collect(pending.pop(0)))
        return results + [runner.collect(step) for step in pending]

    one, two = results_of(1), results_of(2)
    assert tokens_of(two) == tokens_of(one)
    assert [result.logprobs for result in two] == [result.logprobs for result in one]
    assert any(result.logprobs for result in one) == ("logprobs" in fields)


def test_only_rows_that_need_the_last_token_wait_for_it(dense: tuple[Any, Qwen3]) -> None:
    """A thinking budget of two tokens, beside a free row; then the free row alone."""
    _, model = dense
    device = FakeDevice(Clock(), STEP_S)
    runner = runner_on(model, device)
    rules = ThinkingRules(start=250, end=251, inside=True, limit=2, close=(251,), tail=())
    budget = msgspec.structs.replace(sampling(), thinking=rules)
    new = [new_slot(0, random_tokens(6)), new_slot(1, random_tokens(5), budget)]
    rows, pending = pack_ids([0, 1]), []
    pending.append(runner.launch(ForwardBatch(0, new=new, row_slots=rows, row_tokens=pack_ids([6, 5]))))
    assert device.events == ["launch 0"]
    pending.append(runner.launch(ForwardBatch(1, row_slots=rows, row_tokens=pack_ids([1, 1]))))
    assert device.events == ["launch 0", "wait 0", "launch 1"]
    pending.append(runner.launch(ForwardBatch(2)))
    assert device.events[3:] == ["wait 1", "launch 2"]
    released = ForwardBatch(3, released=pack_ids([1]), row_slots=pack_ids([0]), row_tokens=pack_ids([1]))
    pending.append(runner.launch(released))
    assert device.events[5:] == ["launch 3"]
    results = [unpack_ids(runner.collect(step).token_ids) for step in pending]
    assert results[2][1] == 251
    assert 251 not in (results[0][1], results[1][1])


def test_rows_that_fail_are_told_at_the_end(dense: tuple[Any, Qwen3]) -> None:
    reference, model = dense
    model.embedding.weight.tensor[200] = float("nan")
    device = FakeDevice(Clock(), STEP_S)
    runner = runner_on(model, device)
    good = [token for token in random_tokens(7) if token != 200]
    new = [new_slot(0, [1, 200, 3, 4]), new_slot(1, good), new_slot(2, [200, 7])]
    rows = pack_ids([0, 1, 2])
    first = runner.launch(ForwardBatch(0, new=new, row_slots=rows, row_tokens=pack_ids([3, len(good), 2])))
    second = runner.launch(ForwardBatch(1, row_slots=pack_ids([1]), row_tokens=pack_ids([1])))
    result = runner.collect(first)
    assert result.failed == [FailedRow(0), FailedRow(2)]
    tokens = [unpack_ids(result.token_ids)[1], unpack_ids(runner.collect(second).token_ids)[0]]
    assert tokens == expected_tokens(reference, good, 2)
    assert unpack_ids(result.token_ids)[0] == unpack_ids(result.token_ids)[2] == -1


def test_captured_steps_give_the_same_tokens(dense: tuple[Any, Qwen3], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that grow and shrink, across both lengths of context; prefill beside them runs as it is."""
    reference, model = dense
    graphs = FakeGraphs((2, 4, 8))
    device = FakeDevice(Clock(), STEP_S)
    runner = runner_on(model, device, graphs)
    sizes, prepare = list[int](), runner.backend.prepare

    def prepare_and_tell(batch: DeviceBatch) -> Any:
        sizes.append(batch.num_tokens)
        return prepare(batch)

    monkeypatch.setattr(runner.backend, "prepare", prepare_and_tell)
    runner.warm_up()
    assert max(sizes) == SLOTS + CONTEXT, "what the largest step takes is known before requests come"
    assert {*graphs.captured} == {(rows, key) for rows in (2, 4, 8) for key in ("short", "long")}
    prompts = {slot: random_tokens(3 + 3 * slot, seed=slot) for slot in range(5)}
    drawn: dict[int, list[int]] = {slot: [] for slot in prompts}
    number = 0

    def step(rows: list[tuple[int, int]], **fields: Any) -> Callable[[], None]:
        nonlocal number
        slots, counts = zip(*rows, strict=True)
        pending = runner.launch(ForwardBatch(number, row_slots=pack_ids(slots), row_tokens=pack_ids(counts), **fields))
        number += 1

        def collect() -> None:
            for slot, token in zip(slots, unpack_ids(runner.collect(pending).token_ids), strict=True):
                drawn[slot].append(token)

        return collect

    new = [new_slot(slot, ids) for slot, ids in prompts.items()]
    collect = step([(slot, len(ids)) for slot, ids in prompts.items()], new=new)
    for present in ([0, 1, 2, 3, 4], [4, 0, 1, 2, 3], [3, 1], [0], [2, 4, 3], [2, 4, 3], [0, 1, 2, 3, 4], [1]):
        following = step([(slot, 1) for slot in present])
        collect()
        collect = following
    collect()
    sizes = [key[0] for key in graphs.replayed if isinstance(key, tuple)]
    assert sizes == [8, 8, 2, 2, 4, 4, 8, 2]
    for slot, prompt in prompts.items():
        assert drawn[slot] == expected_tokens(reference, prompt, len(drawn[slot]))


class Guesses:
    """Drafts of what will come, wrong at every `wrong`th position."""

    def __init__(self, most: int, wrong: int, sequences: dict[int, list[int]]) -> None:
        self.most = most
        self._wrong = wrong
        self._sequences = sequences

    def propose(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        return [self._of(*row) for row in rows]

    def _of(self, slot: int, tokens: IntArray, most: int) -> list[int]:
        known, position = self._sequences[slot], len(tokens)
        return [
            (known[at] + 1) % 256 if at % self._wrong == 0 else known[at]
            for at in range(position, min(position + most, len(known)))
        ]

    def release(self, slot: int) -> None: ...


@pytest.mark.parametrize("wrong", [1, 2, 3, 1000])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_rows_with_drafts_yield_the_same_tokens_in_fewer_steps(
    dense: tuple[Any, Qwen3], wrong: int, in_flight: int
) -> None:
    """Greedy, seeded with a penalty, and a row without room for drafts beside them; logprobs of all that counts."""
    reference, model = dense
    most, steps = 3, 7
    prompts = {slot: random_tokens(5 + 2 * slot, seed=slot) for slot in range(3)}
    kinds = [
        sampling(logprobs=True),
        sampling(temperature=1.0, seed=9, repetition_penalty=1.2, logprobs=True),
        sampling(),
    ]
    counts = [len(ids) for ids in prompts.values()]
    new = [new_slot(slot, ids, kinds[slot]) for slot, ids in prompts.items()]
    rows = pack_ids(prompts)
    first = ForwardBatch(0, new=new, row_slots=rows, row_tokens=pack_ids(counts))

    def run(drafter: Guesses | None, row_tokens: list[int], number: int) -> list[StepResult]:
        pool = KVPool(model.config, 1, SLOTS * PAGES_A_SLOT, PAGE, model.dtype, model.device)
        compute = fake_compute(FakeDevice(Clock(), STEP_S))
        runner = ModelRunner(model, pool, compute, max_slots=SLOTS, context_length=CONTEXT, drafter=drafter)
        batches = [first, ForwardBatch(1, row_slots=rows, row_tokens=pack_ids(row_tokens))]
        batches += [ForwardBatch(step) for step in range(2, number)]
        results, pending = [], []
        for batch in batches:
            pending.append(runner.launch(batch))
            if len(pending) == in_flight:
                results.append(runner.collect(pending.pop(0)))
        return results + [runner.collect(step) for step in pending]

    plain = run(None, [1, 1, 1], 1 + (1 + most) * steps)
    expected = {slot: [unpack_ids(result.token_ids)[slot] for result in plain] for slot in prompts}
    scores = {slot: [result.logprobs[slot].sampled[0] for result in plain] for slot in (0, 1)}
    assert expected[0][:6] == expected_tokens(reference, prompts[0], 6)
    guesses = Guesses(most, wrong, {slot: prompts[slot] + expected[slot] for slot in prompts})
    drawn: dict[int, list[int]] = {slot: [] for slot in prompts}
    entries: dict[int, list[Any]] = {slot: [] for slot in prompts}
    for result in run(guesses, [1 + most, 1 + most, 1], 1 + steps):
        tokens = unpack_ids(result.token_ids)
        for slot, count in enumerate(unpack_ids(result.counts) if result.counts else [1, 1, 1]):
            drawn[slot] += [tokens.pop(0) for _ in range(count)]
        assert tokens == []
        if result.step > 0:
            assert unpack_ids(result.drafted) == [most, most, 0]
        for entry in result.logprobs:
            entries[entry.row] += entry.sampled
    assert len(drawn[2]) == 1 + steps
    assert len(drawn[0]) == {1: 1 + steps, 1000: 1 + (1 + most) * steps}.get(wrong, len(drawn[0]))
    assert wrong == 1 or len(drawn[0]) > 1 + steps
    for slot in prompts:
        assert drawn[slot] == expected[slot][: len(drawn[slot])]
    for slot in (0, 1):
        assert [entry.token_id for entry in entries[slot]] == drawn[slot]
        for entry, score in zip(entries[slot], scores[slot], strict=False):
            assert abs(entry.logprob - score.logprob) < 1e-5


def test_attributes_reach_the_linears(dense: tuple[Any, Qwen3], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every token, in every linear layer; and none where all rows are plain."""
    _, model = dense
    seen: list[Any] = []
    for kind in (ColumnParallelLinear, RowParallelLinear, QKVLinear):
        call = kind.__call__

        def record(self: Any, x: Any, attributes: Any = None, call: Any = call) -> Any:
            seen.append(None if attributes is None else attributes.adapter.tolist())
            return call(self, x, attributes)

        monkeypatch.setattr(kind, "__call__", record)
    runner = runner_on(model, FakeDevice(Clock(), STEP_S))
    adapted = msgspec.structs.replace(new_slot(1, [7, 8]), attributes=RowAttributes(adapter=4))
    new = [new_slot(0, [5, 6, 7]), adapted]
    runs = [
        ForwardBatch(0, new=new, row_slots=pack_ids([0, 1]), row_tokens=pack_ids([3, 2])),
        ForwardBatch(1, row_slots=pack_ids([1, 0]), row_tokens=pack_ids([1, 1])),
        ForwardBatch(2, row_slots=pack_ids([0]), row_tokens=pack_ids([1])),
    ]
    for batch, adapters in zip(runs, ([0, 0, 0, 4, 4], [4, 0], None), strict=True):
        seen.clear()
        ModelRunner.launch(runner, batch)  # not the one that forbids to look at tensors
        assert seen == [adapters] * (4 * len(model.layers)) + [None]  # the head is no layer's


class GreedyDraw:
    """A `FusedDraw` of rows without a temperature."""

    def admit(self, slot: int, sampling: ResolvedSampling, filters: Filters | None, *, plain: bool) -> None:
        assert plain
        assert filters is None

    def takes(self, slots: Any) -> bool:
        return True

    def __call__(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        tokens: Tensor,
        places: Tensor,
        lengths: Tensor | None = None,
    ) -> Tensor:
        bad = torch.isfinite(logits).all(1).logical_not()
        ids = logits.argmax(1).to(torch.int32).masked_fill(bad, -1)
        tokens.view(-1)[places] = ids.clamp(min=0)
        return ids


def test_a_fused_draw_finds_bad_rows_and_so_does_a_chunk_without_one(dense: tuple[Any, Qwen3]) -> None:
    reference, model = dense
    model.embedding.weight.tensor[200] = float("nan")
    pool = KVPool(model.config, 1, SLOTS * PAGES_A_SLOT, PAGE, model.dtype, model.device)
    compute = fake_compute(FakeDevice(Clock(), STEP_S), FakeGraphs((2, 4)), GreedyDraw())
    runner = ModelRunner(model, pool, compute, max_slots=SLOTS, context_length=CONTEXT)
    runner.warm_up()
    good = [token for token in random_tokens(7) if token != 200]
    new = [new_slot(0, [1, 200, 3, 4]), new_slot(1, good), new_slot(2, [200, 7]), new_slot(3, [200, 9, 8])]
    rows = pack_ids([0, 1, 2, 3])
    first = runner.run(ForwardBatch(0, new=new, row_slots=rows, row_tokens=pack_ids([3, len(good), 2, 1])))
    assert first.failed == [FailedRow(0), FailedRow(2), FailedRow(3)]
    second = runner.run(ForwardBatch(1, row_slots=pack_ids([1]), row_tokens=pack_ids([1])))
    tokens = [unpack_ids(first.token_ids)[1], unpack_ids(second.token_ids)[0]]
    assert tokens == expected_tokens(reference, good, 2)
    only_chunk = [new_slot(4, [5, 200, 6])]
    third = runner.run(ForwardBatch(2, new=only_chunk, row_slots=pack_ids([4]), row_tokens=pack_ids([2])))
    assert third.failed == [FailedRow(0)]
    assert unpack_ids(third.token_ids) == [-1]


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("limit", [0, 2])
def test_a_row_with_a_late_mask_yields_nothing_and_others_go_on(
    dense: tuple[Any, Qwen3], monkeypatch: pytest.MonkeyPatch, in_flight: int, limit: int
) -> None:
    """At the end of its prompt (limit 0) or later; then it goes on with the tokens that would have come."""
    _, model = dense
    rules = ThinkingRules(start=250, end=251, inside=True, limit=limit, close=(251, 252), tail=())
    budget = sampling(temperature=1.0, seed=3, repetition_penalty=1.2, logprobs=True, prompt_logprobs=True)
    new = [new_slot(0, random_tokens(6)), new_slot(1, random_tokens(5, seed=1), replace(budget, thinking=rules))]
    rows = pack_ids([0, 1])
    first = ForwardBatch(0, new=new, row_slots=rows, row_tokens=pack_ids([6, 5]))
    batches = [first, ForwardBatch(1, row_slots=rows, row_tokens=pack_ids([1, 1]))]
    batches += [ForwardBatch(step) for step in range(2, 12)]
    made, fill = threading.Event(), SlotConstraint.fill

    def run(late_steps: range) -> tuple[dict[int, list[int]], list[int], list[Any]]:
        runner = runner_on(model, FakeDevice(Clock(), STEP_S))
        results, pending = [], []
        for batch in batches:
            if batch.step == late_steps.stop:
                made.set()
            monkeypatch.setattr(constraints_module, "PATIENCE_S", 0.005 if batch.step in late_steps else 30.0)
            pending.append(runner.launch(batch))
            if len(pending) == in_flight:
                results.append(runner.collect(pending.pop(0)))
        results += [runner.collect(step) for step in pending]
        drawn: dict[int, list[int]] = {0: [], 1: []}
        for result in results:
            tokens = unpack_ids(result.token_ids)
            for row, count in enumerate(unpack_ids(result.counts) if result.counts else [1, 1]):
                drawn[row] += [tokens.pop(0) for _ in range(count)]
            assert result.failed == []
        without = [result.step for result in results if result.counts]
        assert all(unpack_ids(result.counts) == [1, 0] for result in results if result.counts)
        logprobs = [entry for result in results for entry in result.logprobs]
        return drawn, without, [(e.prompt, [(s.token_id, round(s.logprob, 4)) for s in e.sampled]) for e in logprobs]

    monkeypatch.setattr(SlotConstraint, "is_quick", False)
    made.set()
    expected, none_late, scores = run(range(0))
    assert none_late == []
    assert expected[1][limit : limit + 2] == [251, 252]
    made.clear()
    monkeypatch.setattr(SlotConstraint, "fill", lambda slot, allowed: (made.wait(30), fill(slot, allowed))[1])
    drawn, without, others = run(range(limit, limit + 3))
    assert without == [*range(limit, limit + 3)]
    assert drawn[0] == expected[0]
    assert drawn[1] == expected[1][: len(batches) - 3]
    prompt = [entry for entry in others if entry[0]]
    assert [entry[0] for entry in prompt] == [entry[0] for entry in scores if entry[0]]
    assert [s for entry in others for s in entry[1]] == [s for entry in scores for s in entry[1]][: len(batches) - 3]
    assert len(prompt) == 1


def test_a_row_alone_waits_for_its_mask(dense: tuple[Any, Qwen3], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing else to do, so steps are not spent in vain."""
    _, model = dense
    monkeypatch.setattr(constraints_module, "ALONE_S", 30.0)
    monkeypatch.setattr(SlotConstraint, "is_quick", False)
    fill = SlotConstraint.fill

    def slow_fill(slot: SlotConstraint, allowed: Any) -> None:
        time.sleep(0.1)
        fill(slot, allowed)

    monkeypatch.setattr(SlotConstraint, "fill", slow_fill)
    rules = ThinkingRules(start=250, end=251, inside=True, limit=0, close=(251, 252), tail=())
    runner = runner_on(model, FakeDevice(Clock(), STEP_S))
    new = [new_slot(0, random_tokens(6), replace(sampling(), thinking=rules))]
    batch = ForwardBatch(0, new=new, row_slots=pack_ids([0]), row_tokens=pack_ids([6]))
    assert unpack_ids(runner.run(batch).token_ids) == [251]
