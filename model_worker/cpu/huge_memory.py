"""Memory in huge pages, where the system has them: a third more bandwidth for what is read from end to end."""

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor

REGION_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20  # on x86, and on Arm with 4 KiB pages
ALIGNMENT = 64


class HugeMemory:
    """Hands out tensors from large regions. A region lives as long as any tensor from it; nothing is used twice.

    Memory is committed as it is first written, a huge page at a time.
    """

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, its first byte on a cache line's; zeros, where the system gives such memory."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._region):
            self._region = _reserve(max(size, REGION_BYTES))
            self._used = 0
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        return self._region[start : start + size].view(dtype).view(shape)


def _reserve(size: int) -> Tensor:
    """Bytes that begin where a huge page does."""
    if sys.platform != "linux":
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages; everything works, a little slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE_BYTES
    return tensor[start : start + size]
