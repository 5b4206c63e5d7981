"""Memory that is made ready ahead of its use, seen through what the system says is resident."""

import sys
import time
from pathlib import Path

import pytest
import torch

from vibe_sgl_lite.model_worker.cpu.commit_ahead import CommitAhead
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory

MIB = 1 << 20
ROW_BYTES = 64 << 10
ROWS = 2048  # 128 MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux commits memory ahead")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def wait_for(commit: CommitAhead, wanted: int) -> None:
    deadline = time.monotonic() + 20
    while commit.committed_bytes < wanted:
        assert time.monotonic() < deadline, f"{commit.committed_bytes} of {wanted} bytes"
        time.sleep(0.01)


def test_stays_a_little_ahead_of_what_is_used() -> None:
    data = HugeMemory().empty((ROWS, ROW_BYTES), torch.uint8)
    before = resident_bytes()
    commit = CommitAhead(data, rows_ahead=256)
    wait_for(commit, 16 * MIB)
    time.sleep(0.2)
    assert commit.committed_bytes == 16 * MIB
    assert resident_bytes() - before > 15 * MIB

    commit.reached(99)  # rows 0 to 99, and 256 more when there are no steps
    time.sleep(0.2)
    assert commit.committed_bytes == 16 * MIB
    commit.idle()
    wait_for(commit, 356 * ROW_BYTES)
    time.sleep(0.2)
    assert commit.committed_bytes <= 356 * ROW_BYTES + 2 * MIB
    assert resident_bytes() - before < 40 * MIB
    commit.reached(50)  # lower than before: nothing to do
    commit.idle()

    commit.at_least(400)
    wait_for(commit, 400 * ROW_BYTES)
    commit.at_least(300)
    commit.reached(100)  # and 256 more: fewer than these
    commit.idle()
    time.sleep(0.2)
    assert commit.committed_bytes <= 400 * ROW_BYTES + 2 * MIB
    commit.reached(200)
    commit.idle()
    wait_for(commit, 457 * ROW_BYTES)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_a_step_uses_is_ready_when_it_begins(threads: int) -> None:
    """On all threads at once: a whole number of pieces each, so that none of them waits for another."""
    data = HugeMemory().empty((ROWS, ROW_BYTES), torch.uint8)
    commit = CommitAhead(data, rows_ahead=8, threads=threads)
    wait_for(commit, 2 * MIB)
    before = resident_bytes()
    for row in (100, 100, 300):
        commit.reached(row)
        pieces = -(-((row + 1) * ROW_BYTES - 2 * MIB) // (2 * MIB * threads)) * threads
        assert commit.committed_bytes == 2 * MIB + pieces * 2 * MIB
        assert resident_bytes() - before > pieces * 2 * MIB - MIB
    commit.reached(ROWS - 1)
    assert commit.committed_bytes == data.nbytes


def test_rests_while_others_want_the_cores() -> None:
    data = HugeMemory().empty((ROWS, ROW_BYTES), torch.uint8)
    commit = CommitAhead(data, rows_ahead=8)
    wait_for(commit, 8 * ROW_BYTES)
    commit.rest(True)
    commit.at_least(500)
    time.sleep(0.2)
    assert commit.committed_bytes <= 8 * ROW_BYTES + 2 * MIB
    commit.rest(False)
    wait_for(commit, 500 * ROW_BYTES)


def test_leaves_what_is_there_and_stops_at_the_end() -> None:
    data = HugeMemory().empty((64, ROW_BYTES), torch.uint8)
    data[:] = 7
    commit = CommitAhead(data, rows_ahead=8)
    commit.reached(63)
    wait_for(commit, 64 * ROW_BYTES)
    assert commit.committed_bytes == data.nbytes
    assert bool((data == 7).all())


def test_ends_with_its_memory() -> None:
    data = HugeMemory().empty((ROWS, ROW_BYTES), torch.uint8)
    commit = CommitAhead(data, rows_ahead=8)
    wait_for(commit, 8 * ROW_BYTES)
    del data
    commit.thread.join(20)
    assert not commit.thread.is_alive()
