"""Spare processes: when they are made, taken and replaced. That they become ranks is in test_pipeline.py."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vibe_sgl_lite.runtime.launcher import standby
from vibe_sgl_lite.runtime.launcher.boot import STANDBY_SESSION_NICE
from vibe_sgl_lite.runtime.launcher.spawn import ChildProcess, ChildSpec
from vibe_sgl_lite.runtime.launcher.standby import FREE_BYTES, Standby
from vibe_sgl_lite.runtime.settings.machine import Limit

SPECS = [ChildSpec(f"model_worker.{rank}", "tests.runtime.launcher.fake_child", (str(rank),)) for rank in range(2)]


class Free:
    """What the machine has free; times that it was asked."""

    def __init__(self) -> None:
        self.bytes = FREE_BYTES
        self.asked = 0

    def __call__(self) -> Limit:
        self.asked += 1
        return Limit(self.bytes, "a test")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    made = Free()
    monkeypatch.setattr(standby, "available_memory", made)
    monkeypatch.setattr(standby, "total_memory", lambda: 5 * FREE_BYTES)
    monkeypatch.setattr(standby, "FIRST_S", 0.0)
    return made


@pytest.fixture
def spares(free: Free) -> Iterator[Standby]:
    reader, writer = os.pipe()
    made = Standby(SPECS, 1, reader)
    yield made
    made.close()
    os.close(reader)
    os.close(writer)


def running() -> list[psutil.Process]:
    """Spare processes; what other tests have left is none of ours."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line
            if "--standby" in process.cmdline():
                found.append(process)
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_for_each_rank_until_it_is_taken(spares: Standby) -> None:
    before = len(running())
    assert spares.take("model_worker.0") is None
    spares.keep()
    spares.keep()
    wait_for(lambda: len(running()) == before + 2)
    taken = spares.take("model_worker.0")
    assert taken is not None
    assert taken.spec == SPECS[0]
    assert spares.take("model_worker.0") is None
    kept = running()
    spares.keep()  # at once: this one was wanted
    # A process that has just begun may not show its command line yet; the taken one may have ended by now.
    wait_for(lambda: len({*running()} - {*kept}) == 1)
    taken.kill()
    taken.reap()
    spares.close()
    assert len(running()) == before


def test_one_that_died_is_not_handed_out(spares: Standby) -> None:
    spares.keep()
    first = running()[-1]
    first.kill()
    wait_for(lambda: first not in running())
    taken = [spare for spec in SPECS if (spare := spares.take(spec.name)) is not None]
    assert len(taken) == 1
    taken[0].kill()
    taken[0].reap()


def test_spares_that_die_again_and_again_do_not_take_up_a_core(
    spares: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(running())
    spares.keep()
    for process in running()[before:]:
        process.kill()
    wait_for(lambda: len(running()) == before)
    spares.keep()
    assert len(running()) == before
    monkeypatch.setattr(standby, "AGAIN_S", 0.0)
    spares._due = 0.0  # as if time had passed
    spares.keep()
    assert len(running()) == before + 2


def test_none_where_memory_is_scarce_and_it_is_not_asked_all_the_time(spares: Standby, free: Free) -> None:
    free.bytes = FREE_BYTES - 1
    before = len(running())
    for _ in range(100):
        spares.keep()
    assert len(running()) == before
    assert free.asked == 1


def test_none_where_processes_or_files_are_used_up(spares: Standby, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine serves without; it must not end for want of a spare."""

    def refuse(*_: object) -> ChildProcess:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = len(running())
    with monkeypatch.context() as patch:
        patch.setattr(standby, "ChildProcess", refuse)
        spares.keep()
    spares._due = 0.0  # as if time had passed
    spares.keep()
    assert len(running()) == before + 2


def test_none_where_a_model_takes_nearly_all_of_a_machine(
    spares: Standby, free: Free, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "total_memory", lambda: 20 * FREE_BYTES)
    free.bytes = 4 * FREE_BYTES - 1
    before = len(running())
    spares.keep()
    assert len(running()) == before
    free.bytes = 4 * FREE_BYTES
    spares._due = 0.0  # as if time had passed
    spares.keep()
    assert len(running()) == before + 2


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no scheduling by sessions here")
def test_its_session_comes_last_until_it_is_started(spares: Standby, tmp_path: Path) -> None:
    spares.keep()
    spare = spares.take(SPECS[0].name)
    assert spare is not None
    autogroup = Path(f"/proc/{spare.pid}/autogroup")
    wait_for(lambda: autogroup.read_text().endswith(f" nice {STANDBY_SESSION_NICE}\n"))
    spec_file = tmp_path / "spec.fifo"
    os.mkfifo(spec_file)  # its reader waits until there is something to read
    spare.start(spec_file)
    wait_for(lambda: autogroup.read_text().endswith(" nice 0\n"))
    spare.kill()
    spare.reap()


def test_it_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    spare = ChildProcess(SPECS[0], None, 1, reader)
    os.close(reader)
    assert spare._popen.stdin is not None
    spare._popen.stdin.close()
    assert spare._popen.wait(30) == 0
    os.close(writer)
