"""Memory that is committed before it is wanted, by what the system says is resident."""

import ctypes
import sys
import time

import pytest
import torch

from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.early_memory import EarlyMemory

MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is resident")


def resident_pages(address: int, size: int) -> int | None:
    """Of 4 KiB, as mincore(2) says; None where nothing is mapped any more."""
    there = (ctypes.c_ubyte * (size // 4096))()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there) != 0:
        return None
    return sum(page & 1 for page in there)


@linux
def test_is_committed_while_nobody_takes_it_and_goes_with_its_last_tensor() -> None:
    early = EarlyMemory(96 * MIB)
    early._thread.join(30)
    memory = HugeMemory(early.take())
    assert early.take() is None
    first = memory.empty((64 * MIB,), torch.uint8)
    address = first.data_ptr()
    assert address % (2 * MIB) == 0
    resident = resident_pages(address, 96 * MIB)
    assert resident is not None
    assert resident >= 48  # one of each huge page, or all of it where the system had some
    assert not first.any()
    second = memory.empty((64 * MIB,), torch.uint8).fill_(1)  # no room for it there
    assert not first.any()
    del memory, first
    assert resident_pages(address, 96 * MIB) is None
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
