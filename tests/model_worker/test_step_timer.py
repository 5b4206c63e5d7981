"""Timed parts: every moment has one owner, results do not change, and each part of a model is found."""

from pathlib import Path
from typing import Any

import pytest

from tests.model_worker.test_model_runner import Driver, new_slot, runner_of, sampling
from tests.qwen3.harness import DENSE, MOE, compute_of, load_model, make_checkpoint, random_tokens
from vibe_sgl_lite.model_worker.step_timer import OTHER, StepTimer, time_collectives, time_parts
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState

# Parts of a step by what the model is; what is fused has one name.
EVERYWHERE = {"apply", "prepare", "embedding", "qkv", "rope", "attention", "o", "norm", "silu", "gate_up", "down",
              "head", "sampling"}  # fmt: skip


class Clock:
    """Stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_a_moment_belongs_to_the_innermost_part() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    inner = timer.timed("inner", clock.pass_)

    def outer_call(inside: int, *, after: float) -> int:
        clock.pass_(1)
        for _ in range(inside):
            inner(10)
        clock.pass_(after)
        return inside

    outer = timer.timed("outer", outer_call)
    clock.pass_(1000)
    assert outer(2, after=3) == 2
    clock.pass_(2000)
    assert timer.take() == {"inner": 20, "outer": 4, OTHER: 3000}
    assert timer.take() == {}
    clock.pass_(5)
    assert outer(1, after=0) == 1
    owners, seconds = timer.take_segments()
    assert [timer.names[i] for i in owners] == [OTHER, "outer", "inner", "outer", OTHER]
    assert seconds.tolist() == [5, 1, 10, 0, 0]


def test_a_take_within_a_part_cuts_it() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    taken = []

    def call() -> None:
        clock.pass_(1)
        taken.append(timer.take())
        clock.pass_(2)

    timer.timed("part", call)()
    assert [*taken, timer.take()] == [{"part": 1}, {"part": 2}]


def test_a_part_that_fails_ends_too() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    with pytest.raises(ZeroDivisionError):
        timer.timed("broken", lambda: 1 // 0)()
    clock.pass_(7)
    assert timer.take() == {OTHER: 7}


def test_only_groups_of_several_ranks_are_timed() -> None:
    alone = ParallelState()
    assert time_collectives(alone, StepTimer()) == alone
    assert type(time_collectives(alone, StepTimer()).tp) is Group


@pytest.mark.parametrize("compute_name", ["torch", "kernels"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_parts_add_up_and_change_nothing(tmp_path: Path, shape: dict[str, Any], compute_name: str) -> None:
    compute = compute_of(compute_name)
    make_checkpoint(tmp_path, shape)
    prompt = random_tokens(13)
    tokens = []
    for timed in (False, True):
        runner = runner_of(load_model(tmp_path, compute=compute), compute=compute)
        timer = StepTimer()
        if timed:
            time_parts(runner, timer)
        driver = Driver(runner)
        new = [new_slot(0, prompt), new_slot(1, prompt, sampling(temperature=1.0, seed=5))]
        driver.run([(0, 13), (1, 13)], new=new)
        for _ in range(6):
            timer.take()
            result = driver.run([(0, 1), (1, 1)])
            taken = timer.take()
            if timed:
                expected = EVERYWHERE | ({"router"} if shape is MOE else set())
                assert {*taken} - {OTHER} == expected
                assert sum(taken.values()) >= result.total_s
                assert sum(taken.values()) - taken[OTHER] <= result.total_s
            else:
                assert list(taken) == [OTHER]
        tokens.append(driver.tokens)
    assert tokens[0] == tokens[1]
