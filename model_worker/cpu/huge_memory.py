"""Memory in huge pages, where the system has them: a third more bandwidth for what is read from end to end."""

import math

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.early_memory import reserve

REGION_BYTES = 64 << 20
ALIGNMENT = 64


class HugeMemory:
    """Hands out tensors from large regions. A region lives as long as any tensor from it; nothing is used twice.

    Memory is committed as it is first written, a huge page at a time. first: a region to begin with.
    """

    def __init__(self, first: memoryview | None = None) -> None:
        self._region = torch.empty(0, dtype=torch.uint8) if first is None else _bytes(first)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, its first byte on a cache line's; zeros, where the system gives such memory."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._region):
            self._region = _bytes(reserve(max(size, REGION_BYTES)))
            self._used = 0
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        return self._region[start : start + size].view(dtype).view(shape)


def _bytes(region: memoryview) -> Tensor:
    return torch.frombuffer(region, dtype=torch.uint8)
