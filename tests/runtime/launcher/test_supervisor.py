"""The supervisor against a brute-force model of what may start again, and its rules one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec
from vibe_sgl_lite.runtime.launcher.supervisor import MAX_DELAY_S, WINDOW_S, Supervisor

NAMES = ["model_worker.0", "model_worker.1", "tokenizer_manager", "scheduler", "detokenizer"]
RANKS = NAMES[:2]
CHILDREN = [ChildSpec(name, "m") for name in NAMES]


def running(max_restarts: int = 3) -> Supervisor:
    supervisor = Supervisor(CHILDREN, max_restarts)
    assert not supervisor.all_running
    for name in NAMES:
        supervisor.ready(name)
    assert supervisor.all_running
    return supervisor


def test_who_starts_again_together() -> None:
    assert running().died(["model_worker.1"], 0.0) == RANKS
    assert running().died(["scheduler"], 0.0) == [*RANKS, "scheduler"]
    assert running().died(["detokenizer"], 0.0) == ["detokenizer"]
    assert running().died(["tokenizer_manager"], 0.0) == ["tokenizer_manager"]
    assert running().died(["tokenizer_manager", "model_worker.0"], 0.0) == [*RANKS, "tokenizer_manager"]


def test_the_first_restart_comes_at_once_and_later_ones_wait_longer() -> None:
    supervisor = running(max_restarts=100)
    now, waits = 0.0, []
    for _ in range(8):
        assert supervisor.died(["detokenizer"], now) == ["detokenizer"]
        start = now
        while not supervisor.due(now):
            now += 0.25
        waits.append(now - start)
        supervisor.ready("detokenizer")
        assert supervisor.all_running
    assert waits[0] == 0.0
    assert waits[1:4] == [0.5, 1.0, 2.0]
    assert max(waits) == MAX_DELAY_S


def test_a_group_gives_up_after_its_own_restarts() -> None:
    supervisor = running(max_restarts=2)
    for now in (0.0, 1.0):
        assert supervisor.died(["scheduler"], now) is not None
        supervisor.due(now + 10)
    assert supervisor.died(["detokenizer"], 2.0) == ["detokenizer"], "another's deaths do not count"
    assert supervisor.died(["scheduler"], 3.0) is None


def test_ranks_are_not_blamed_for_the_schedulers_deaths() -> None:
    supervisor = running(max_restarts=1)
    assert supervisor.died(["model_worker.0"], 0.0) == RANKS
    assert supervisor.died(["scheduler"], 1.0) == [*RANKS, "scheduler"]


def test_old_restarts_are_forgotten_and_zero_never_restarts() -> None:
    supervisor = running(max_restarts=1)
    assert supervisor.died(["detokenizer"], 0.0) is not None
    assert supervisor.died(["detokenizer"], WINDOW_S + 1) is not None
    assert running(max_restarts=0).died(["detokenizer"], 0.0) is None


@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0.0, 40.0)), max_size=30),
)
def test_against_a_list_of_all_deaths(max_restarts: int, deaths: list[tuple[str, float]]) -> None:
    """It gives up exactly when the dead child's group has had its restarts within the window."""
    supervisor, now = running(max_restarts), 0.0
    history: list[tuple[str, float]] = []  # group, when it was last started again
    for name, wait in deaths:
        now += wait
        for started in supervisor.due(now):
            supervisor.ready(started)
        if supervisor.state(name) != "running":
            continue
        group = "ranks" if name in RANKS else name
        recent = [at for other, at in history if other == group and at > now - WINDOW_S]
        ended = supervisor.died([name], now)
        assert (ended is None) == (len(recent) >= max_restarts)
        if ended is None:
            return
        assert name in ended
        assert {supervisor.state(child) for child in ended} == {"backing off"}
        history += [(g, now) for g in ({group} | ({"ranks"} if group == "scheduler" else set()))]
    while not supervisor.all_running:
        now += MAX_DELAY_S
        for started in supervisor.due(now):
            supervisor.ready(started)
