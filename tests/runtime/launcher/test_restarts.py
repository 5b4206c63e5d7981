"""Children that die are started again, alone or with their group."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runtime.launcher.toy import NAMES, children, processes, restarting, told, wait_for
from vibe_sgl_lite.runtime.launcher import standby, watch
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.spawn import ChildProcess
from vibe_sgl_lite.runtime.launcher.watch import Watch
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs


@pytest.mark.parametrize(
    ("victim", "together", "told_manager"),
    [
        ("model_worker.0", {"model_worker.0"}, False),
        ("scheduler", {"model_worker.0", "scheduler"}, True),
        ("detokenizer", {"detokenizer"}, True),
    ],
)
def test_a_killed_child_starts_again_alone_or_with_its_group(
    model: Path, victim: str, together: set[str], told_manager: bool
) -> None:
    with restarting(model) as engine:
        before = processes()
        before[victim].kill()
        wait_for(lambda: processes().get(victim, before[victim]) != before[victim])
        wait_for(lambda: len(processes()) == 4)
        after = processes()
        assert {name for name in NAMES if after[name].pid != before[name].pid} == together
        if told_manager:
            wait_for(lambda: any("EngineLost" in line and victim in line for line in told(model)))
        assert engine.failure is None
        assert not any("AbortAll" in line for line in told(model))


def test_the_scheduler_hears_of_lost_ranks_and_lost_clients(model: Path) -> None:
    args = ServerArgs(model_path=str(model), log_level="error", restart="on-failure")
    with Pipeline(args, children=children(scheduler="note ready")):
        processes()["model_worker.0"].kill()
        wait_for(lambda: [line for line in told(model) if "RanksLost(epoch=1)" in line])
        processes()["tokenizer_manager"].kill()
        wait_for(lambda: [line for line in told(model) if "ClientsLost" in line])
        wait_for(lambda: "model_worker.0" in processes())
        processes()["model_worker.0"].kill()
        wait_for(lambda: [line for line in told(model) if "RanksLost(epoch=2)" in line])


def test_a_restarted_rank_has_sockets_and_a_pool_of_its_own(model: Path, run_base: Path) -> None:
    def spec() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next((run_base / "default").glob("*/spec.json")).read_text())
        return found

    with restarting(model):
        first = spec()
        assert (first["endpoints"]["epoch"], first["args"]["max_total_tokens"]) == (0, None)
        processes()["model_worker.0"].kill()
        wait_for(lambda: spec()["endpoints"]["epoch"] == 1)
        assert spec()["args"]["max_total_tokens"] == 7 * 16
        assert spec()["epoch"] != first["epoch"]


def test_it_gives_up_after_the_restarts_it_may_try(model: Path) -> None:
    engine, seen = restarting(model, max_restarts=1), []
    engine.start()
    for _ in range(2):
        wait_for(lambda: "detokenizer" in processes())
        seen.append(processes()["detokenizer"])
        seen[-1].kill()
        wait_for(lambda: processes().get("detokenizer") != seen[-1])
    assert engine.wait(30)
    assert engine.failure is not None
    assert engine.failure.startswith("detokenizer was killed by SIGKILL")  # "while starting" where it was quick
    assert engine.failure.endswith("given up after 1 restarts in 60 s")
    assert [line for line in told(model) if "AbortAll" in line and "engine_dead" in line]
    assert processes() == {}


def test_a_spare_process_takes_the_place_of_a_dead_rank(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spares() -> list[int]:
        """Those that began as one."""
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child.pid] if "--standby" in child.cmdline() else []
        return found

    monkeypatch.setattr(standby, "FIRST_S", 0.0)
    with restarting(model, rank="note ready") as engine:
        wait_for(spares)
        (spare,) = spares()
        rank = next(c for c in psutil.Process().children() if c.pid != spare and "model_worker.0" in c.cmdline())
        rank.kill()
        wait_for(lambda: len(spares()) == 2)  # one runs as the rank, and there is another for the next time
        assert spare in spares()
        assert engine.failure is None
        engine.stop()
    assert told(model).count("Shutdown()") == 2  # of the tokenizer manager and of the rank
    assert processes() == {}


def test_a_full_disk_is_waited_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child that starts again reads cannot be written twice, then it can."""
    write_spec, calls = Pipeline._write_spec, []

    def full(pipeline: Pipeline, epoch: int) -> Path:
        calls.append(epoch)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_spec(pipeline, epoch)

    monkeypatch.setattr(Pipeline, "_write_spec", full)
    with restarting(model) as engine:
        processes()["detokenizer"].kill()
        wait_for(lambda: len(calls) == 4 and "detokenizer" in processes())
        assert engine.failure is None


def test_a_hung_child_starts_again(model: Path) -> None:
    with restarting(model, scheduler="accuse=model_worker.0 ready") as engine:
        first = processes()["model_worker.0"]
        wait_for(lambda: processes().get("model_worker.0", first) != first)
        assert engine.failure is None


def test_an_accusation_that_comes_late_is_not_its_successors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = Watch._end

    def end_and_hear(watch: Watch, names: Sequence[str]) -> None:
        end(watch, names)
        watch._hung = ("model_worker.0", "no step result")

    with restarting(model) as engine:
        first = processes()["model_worker.0"]
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "_end", end_and_hear)
            first.kill()
            wait_for(lambda: processes().get("model_worker.0", first) != first)
        second = processes()["model_worker.0"]
        assert engine._watch is not None
        wait_for(lambda: engine._watch._supervisor.all_running)  # type: ignore[union-attr]
        assert second.is_running()
        assert engine.failure is None


def test_a_child_that_the_system_does_not_let_go_of_holds_nobody_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much memory takes the system seconds to free, and a device may take longer."""
    monkeypatch.setattr(watch, "REAP_S", 0.2)
    kill = ChildProcess.kill
    stays: list[ChildProcess] = []

    def kill_others(child: ChildProcess) -> None:
        if child.name == "detokenizer" and not stays:
            stays.append(child)
        if child not in stays:
            kill(child)

    try:
        with restarting(model, scheduler="accuse=detokenizer ready") as engine:
            first = processes()["detokenizer"]
            monkeypatch.setattr(ChildProcess, "kill", kill_others)
            wait_for(lambda: processes().get("detokenizer", first) != first)
            assert engine.failure is None
    finally:
        first.kill()


def test_a_stop_while_a_child_starts_again_is_clean(model: Path) -> None:
    engine = restarting(model)
    engine.start()
    processes()["detokenizer"].kill()
    engine.stop()
    assert engine.wait(0)
    assert processes() == {}


@pytest.mark.parametrize("first", ["it dies", "the stop"])
def test_a_tokenizer_manager_that_starts_again_drains_too(model: Path, first: str) -> None:
    """Else it takes requests, and the stop waits for its time limit."""
    engine = restarting(model, manager="note slow_drain")
    engine.start()
    manager = processes()["tokenizer_manager"]
    if first == "the stop":
        engine.request_stop(60.0)
        wait_for(lambda: told(model) == ["Drain()"])
    manager.kill()
    wait_for(lambda: processes().get("tokenizer_manager", manager) != manager)
    began = time.monotonic()
    engine.stop(60.0)
    assert time.monotonic() - began < 30
    assert told(model)[-2:] == ["Drain()", "Shutdown()"]
    assert engine.failure is None
