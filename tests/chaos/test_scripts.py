"""The longer scripts in short runs, what they compute, and that the suite finds mistakes put into the engine."""

from __future__ import annotations

import pytest

from tests.chaos import aborts, engine_kills, kills, soak
from tests.chaos.planted import FAULTS, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_mistake_is_found(name: str) -> None:
    fault = FAULTS[name]
    failed, words = found(fault, fault.found_by)
    assert failed, words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills() -> None:
    kills.run(kills=10, seed=0, streams=8, tokens=100, wait=1.0, flags=())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_engine_kills() -> None:
    counts = engine_kills.run(kills=3, seed=0, clients=3, wait=0.5, flags=())
    assert counts["disk_loaded_tokens_total"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_aborts() -> None:
    aborts.run(aborts=400, seed=0, flags=())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak() -> None:
    soak.run(minutes=0.5, seed=0, kills=4.0, flags=())


def test_a_slope_is_growth_an_hour_of_those_who_were_there_all_the_time() -> None:
    samples = [(at, {"steady": 50_000_000, "leaks": 10_000_000 + 500 * at}) for at in range(0, 3600, 600)]
    samples[0][1]["died"] = 7
    found = soak.slopes([(float(at), memory) for at, memory in samples])
    assert found.keys() == {"steady", "leaks"}
    assert found["steady"] == pytest.approx(0.0)
    assert found["leaks"] == pytest.approx(1.8)


def test_the_table_of_pauses() -> None:
    lines = kills.table({"b": [2.0], "a": [1.0, 3.0, 2.0]}).splitlines()
    assert lines[2:] == ["| a | 3 | 2.00 s | 3.00 s | 3.00 s |", "| b | 1 | 2.00 s | 2.00 s | 2.00 s |"]
