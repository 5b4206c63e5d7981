"""A CUDA device behind the host's back (model_worker/device.py): pinned memory, events, and a thread that waits."""

import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import ALIGNMENT, Array, ReadBack

_SMALL_BYTES, _SMALL_COPIES = 1 << 14, 16  # more than steps are ever in flight
_STAGING_PART, _STAGING_PARTS = 1 << 20, 4


class _PinnedCopies:
    """A `ReadBack` of copies to pinned memory that an event follows."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[Array]:
        self.event.synchronize()
        return [copy.numpy() for copy in self._copies]


class _SmallCopy:
    """A `ReadBack` of one small tensor, through memory and an event of a few that are used in turn."""

    def __init__(self, tensor: Tensor, memory: Tensor, event: torch.cuda.Event) -> None:
        self._copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._copy.copy_(tensor, non_blocking=True)
        self.event = event
        event.record()

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[Array]:
        self.event.synchronize()
        return [self._copy.numpy().copy()]


class _PinnedRing:
    """Pinned memory for small copies to the device, in parts: one is written anew when the copies from it are done."""

    def __init__(self) -> None:
        self._memory = torch.empty(_STAGING_PARTS * _STAGING_PART, dtype=torch.uint8, pin_memory=True)
        self._bytes = self._memory.numpy()
        self._left = [torch.cuda.Event() for _ in range(_STAGING_PARTS)]  # type: ignore[no-untyped-call]
        self._part, self._used = 0, 0

    def put(self, host: Tensor) -> Tensor:
        """A pinned copy of a contiguous tensor, for a copy that is enqueued right after this call."""
        if self._used + host.nbytes > _STAGING_PART:
            self._left[self._part].record()
            self._part, self._used = (self._part + 1) % _STAGING_PARTS, 0
            self._left[self._part].synchronize()
        start = self._part * _STAGING_PART + self._used
        end = start + host.nbytes
        self._used += -(-host.nbytes // ALIGNMENT) * ALIGNMENT
        self._bytes[start:end] = host.numpy().reshape(-1).view(np.uint8)
        return self._memory[start:end].view(host.dtype).view(host.shape)


class CudaDevice:
    """A `Device` whose work runs on torch's current stream. A thread waits for it, so that a poll can."""

    synchronous = False

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.completion_fd: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._staging = _PinnedRing()
        self._small = deque(
            (torch.empty(_SMALL_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            for _ in range(_SMALL_COPIES)
        )
        self._awaited: queue.SimpleQueue[_PinnedCopies | _SmallCopy] = queue.SimpleQueue()
        threading.Thread(target=self._wake, name="device-completions", daemon=True).start()

    def tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def copy(self, host: Tensor, target: Tensor) -> None:
        staged = self._staging.put(host) if host.nbytes <= _STAGING_PART else host.pin_memory()
        target.copy_(staged, non_blocking=True)

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        copies: _PinnedCopies | _SmallCopy
        if len(tensors) == 1 and tensors[0].nbytes <= _SMALL_BYTES:
            self._small.rotate(-1)
            copies = _SmallCopy(tensors[0], *self._small[0])
        else:
            copies = _PinnedCopies(tensors)
        self._awaited.put(copies)
        return copies

    def acknowledge(self) -> None:
        assert self.completion_fd is not None
        with suppress(BlockingIOError):  # acknowledged before
            os.eventfd_read(self.completion_fd)

    def _wake(self) -> None:
        assert self.completion_fd is not None
        torch.cuda.set_device(self.torch_device)
        while True:
            self._awaited.get().event.synchronize()
            os.eventfd_write(self.completion_fd, 1)
