"""Every process is killed and every kind of harm is done while requests of every kind run; none of them notices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.chaos.actions import ACTIONS, DEADLY
from tests.chaos.driver import ASKS, DEATHS_A_ROUND, SETTLE, Step, draw, lab, shrink

EVERY_KIND = [Step("submit", number) for number in range(ASKS)]
DETOKENIZER, RANK, SCHEDULER, TOKENIZER_MANAGER = range(4)  # by name; without those behind it, a number is the same


@pytest.mark.timeout(600)  # 20 s of CPU time, and settled only when all processes are there again
def test_nobody_notices_what_happens() -> None:
    script = []
    for first, second in ((TOKENIZER_MANAGER, RANK), (SCHEDULER, DETOKENIZER)):
        script += [*EVERY_KIND, Step("flow"), Step("kill", first), Step("kill", second, 0.2), SETTLE]
    script += [
        *EVERY_KIND,
        Step("flow"),
        *(Step(name, number, 0.1) for number, name in enumerate(ACTIONS) if name != "kill"),
        SETTLE,
    ]
    script[-1:-1] = [Step("garbage", number, 0.3) for number in range(8)]
    with lab() as engine:
        assert engine.run(script) is None
        assert engine.world.daemon.log().count("unreadable frames") < 8, "garbage fills the log"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_scripts(seed: int) -> None:
    with lab() as engine:
        assert engine.run(draw(seed, rounds=3)) is None


def test_a_script_comes_from_its_seed_alone() -> None:
    script = draw(7, rounds=50)
    assert script == draw(7, rounds=50)
    assert script != draw(8, rounds=50)
    assert {step.action for step in script} == {*ACTIONS, "settle"}
    start = 0
    while start < len(script):
        end = script.index(SETTLE, start)
        assert sum(step.action in DEADLY for step in script[start:end]) <= DEATHS_A_ROUND
        start = end + 1


def test_a_failing_script_is_shrunk_to_what_matters() -> None:
    script = draw(1, rounds=5)
    kill, crash = Step("kill", 1, 0.1), Step("crash", 2, 0.2)
    script[20:20], script[50:50] = [kill], [crash]
    tried = []

    def fails(part: Sequence[Step]) -> bool:
        tried.append(part)
        return kill in part and crash in part

    assert shrink(script, fails) == [kill, crash]
    assert len(tried) < len(script) * 2
