"""Memory that is committed before it is wanted, seen through what the system says is resident."""

import sys
import time
from pathlib import Path

import pytest
import torch

from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.early_memory import EarlyMemory

MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is resident")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@linux
def test_is_committed_while_nobody_takes_it_and_goes_with_its_last_tensor() -> None:
    before = resident_bytes()
    early = EarlyMemory(96 * MIB)
    early._thread.join(30)
    huge = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if huge:
        assert resident_bytes() - before > 80 * MIB
    memory = HugeMemory(early.take())
    assert early.take() is None
    first = memory.empty((64 * MIB,), torch.uint8)
    assert not first.any()
    assert first.data_ptr() % (2 * MIB) == 0
    second = memory.empty((64 * MIB,), torch.uint8).fill_(1)  # no room for it there
    assert not first.any()
    del memory, first
    assert resident_bytes() - before < 80 * MIB
    assert bool(second.all())


def test_is_all_zeros_and_left_alone_once_it_is_taken() -> None:
    early = EarlyMemory(1024 * MIB)  # long from being committed
    memory = early.take()
    assert memory is not None
    assert not early._thread.is_alive()
    bytes_there = torch.frombuffer(memory, dtype=torch.uint8)
    assert not bytes_there[: 4 * MIB].any()
    bytes_there[: 64 * MIB : 2 * MIB] = 7
    time.sleep(0.01)
    assert bool((bytes_there[: 64 * MIB : 2 * MIB] == 7).all())
