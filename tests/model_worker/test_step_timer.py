"""Timed parts: every moment has one owner, results do not change, and each part of a model is found."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_worker.test_model_runner import Driver, new_slot, runner_of, sampling
from tests.qwen3.harness import DENSE, MOE, compute_of, load_model, make_checkpoint, random_tokens
from vibe_sgl_lite.model_worker.step_timer import StepTimer, time_collectives
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER

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


def test_a_moment_belongs_to_the_part_that_was_marked_last() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    clock.pass_(1000)
    for part, seconds in (("a", 2), ("b", 10), ("a", 3), (OTHER, 1)):
        timer.mark(part)
        clock.pass_(seconds)
    assert timer.take() == {"a": 5, "b": 10, OTHER: 1001}
    assert timer.take() == {}
    timer.mark("b")
    clock.pass_(5)
    timer.mark("a")
    owners, seconds_each = timer.take_segments()
    assert [timer.names[i] for i in owners] == [OTHER, "b", "a"]
    assert seconds_each.tolist() == [0, 5, 0]


def test_a_take_within_a_part_cuts_it() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    timer.mark("part")
    clock.pass_(1)
    taken = timer.take()
    clock.pass_(2)
    assert [taken, timer.take()] == [{"part": 1}, {"part": 2}]


def test_a_call_inside_a_part_is_its_own_also_when_it_fails() -> None:
    clock = Clock()
    timer = StepTimer(clock)

    def fail() -> torch.Tensor:
        clock.pass_(7)
        raise ZeroDivisionError

    timer.mark("outer")
    clock.pass_(1)
    with pytest.raises(ZeroDivisionError):
        timer.inside("inner", fail)
    clock.pass_(2)
    assert timer.take() == {"outer": 3, "inner": 7}


def test_parts_that_ran_unmarked_share_the_time_since_the_last_mark() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    timer.mark("before")
    clock.pass_(5)
    timer.mark(OTHER)
    clock.pass_(10)
    timer.spread(["a", "b", "a"], lambda: [1.0, 2.0, 4.0])
    clock.pass_(1)
    assert timer.take() == {"before": 5, "a": 5, "b": 2, OTHER: 3 + 1}


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
        timer, within = StepTimer(), []
        model = load_model(tmp_path, compute=compute)
        runner = runner_of(model, compute=compute, timer=timer if timed else NO_TIMER)
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
                within.append(sum(taken.values()) - taken[OTHER] <= result.total_s)
            else:
                assert list(taken) == [OTHER]
        assert not timed or any(within), "a busy machine may take time behind the step, but not of all"
        tokens.append(driver.tokens)
    assert tokens[0] == tokens[1]
