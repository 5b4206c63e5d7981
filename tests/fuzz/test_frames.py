"""A small part of what `python -m tests.fuzz.frames` does."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.frames import SHARES, make_frame, mutate_value, run, run_live
from tests.integration.daemon import running
from vibe_sgl_lite import SamplingParams

GREEDY = SamplingParams(max_new_tokens=50, temperature=0, ignore_eos=True)


@pytest.mark.timeout(120)
def test_nothing_raises() -> None:
    done = run(seed=1, first=0, count=4000, seconds=60.0)
    assert {*done} == {name for name, _ in SHARES}


def test_a_case_is_the_same_again() -> None:
    one, again = ([make_frame(random.Random(f"{seed}")) for seed in range(200)] for _ in range(2))
    assert one == again
    assert len(set(one)) > 150


def test_mutations_leave_what_they_begin_with_alone() -> None:
    value = ["Generate", {"a": [1, 2, {"b": "c"}]}, [[]]]
    for seed in range(200):
        mutate_value(random.Random(seed), value)
    assert value == ["Generate", {"a": [1, 2, {"b": "c"}]}, [[]]]


@pytest.mark.timeout(300)
def test_an_engine_serves_on() -> None:
    with running("--dtype", "float32") as daemon, daemon.client() as client:
        expected = client.generate("Once upon a time", GREEDY).token_ids
        before = daemon.children()
        assert run_live(2, 3000, 60.0, daemon.address) > 100
        assert client.generate("Once upon a time", GREEDY).token_ids == expected
        after = daemon.children()
        assert all(after.get(name) == process for name, process in before.items())
        assert "Traceback" not in daemon.log()
