"""A rank that is stuck in a collective learns that one of another node has died; an orderly end is none."""

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from vibe_sgl_lite.model_worker.lifeline import Lifeline, hold_lifeline

OTHERS = [2, 3]
WAIT_S = 30
STUCK = """
import os, sys, time
from torch._C._distributed_c10d import FileStore
from vibe_sgl_lite.model_worker.lifeline import hold_lifeline
def lost(rank):
    print("lost", rank, flush=True)
    os._exit(7)
rank = int(sys.argv[1])
line = hold_lifeline(FileStore(sys.argv[2], 2), rank, [1], "127.0.0.1", 30, lost)
print("held", flush=True)
time.sleep(600)
"""


def hold_all() -> tuple[dict[int, Lifeline], "queue.Queue[tuple[int, int]]"]:
    """The lifelines of ranks 0, 2 and 3, and (who says so, who is lost)."""
    store, lines, said = HashStore(), dict[int, Lifeline](), queue.Queue[tuple[int, int]]()

    def hold(rank: int) -> None:
        lines[rank] = hold_lifeline(store, rank, OTHERS, "127.0.0.1", WAIT_S, lambda lost: said.put((rank, lost)))

    threads = [threading.Thread(target=hold, args=(rank,)) for rank in (0, *OTHERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(lines) == [0, *OTHERS]
    return lines, said


def end(line: Lifeline) -> None:
    """As the end of its process does."""
    for connection in line._connections.values():
        connection.shutdown(2)


def test_an_end_without_farewell_is_a_loss() -> None:
    lines, said = hold_all()
    end(lines[3])
    first = {said.get(timeout=WAIT_S), said.get(timeout=WAIT_S)}
    assert first == {(0, 3), (3, 0)}  # a connection that was shut down has ended for both
    assert said.empty()  # rank 2's is another one


def test_an_end_after_a_farewell_is_none() -> None:
    lines, said = hold_all()
    for rank in (2, 0, 3):
        lines[rank].say_farewell()
    for rank in (3, 0, 2):
        end(lines[rank])
    for thread in threading.enumerate():
        if thread.name == "lifeline":
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert said.empty()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_main_thread_is_stuck_learns_of_a_kill(tmp_path: Path, victim: int) -> None:
    command = [sys.executable, "-c", STUCK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "held\n"
        os.kill(ranks[victim].pid, signal.SIGKILL)
        said = ranks[1 - victim].communicate(timeout=WAIT_S)[0]
        assert (said, ranks[1 - victim].returncode) == (f"lost {victim}\n", 7)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
