"""How the host hands a step to a device and gets its results: at once on a CPU, behind the host's back on a GPU.

On a GPU nothing here waits but `ReadBack.wait`: the host's arrays are copied to pinned memory, which torch keeps until
the copy from there is done, and everything else is enqueued on the current stream.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
_ALIGNMENT = 16  # bytes
_SMALL_BYTES, _SMALL_COPIES = 1 << 14, 16  # more than steps are ever in flight
_STAGING_PART, _STAGING_PARTS = 1 << 20, 4
_ONE_COPY_BYTES = 1 << 16  # a block up to this size is copied whole: cheaper than to say which parts are in use


class ReadBack(Protocol):
    """Tensors on their way to the host."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> list[Array]:
        """Their values, when everything enqueued before has run."""
        ...


class Device(Protocol):
    """One device of one rank. torch_device: as torch names it. For one thread.

    synchronous: what is enqueued has run when the call returns, and the host's memory is the device's.
    completion_fd: becomes readable when a `ReadBack` may have got done; None where they are done at once. Whoever polls
        it calls `acknowledge` before looking at them.
    """

    torch_device: torch.device
    synchronous: bool
    completion_fd: int | None

    def tensor(self, array: Array) -> Tensor:
        """A new tensor with the array's values; the array may not be written to afterwards."""
        ...

    def copy(self, host: Tensor, target: Tensor) -> None:
        """Copy to a tensor on the device; `host` may be overwritten as soon as this returns."""
        ...

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        """Ask for the values that they will have when all that is enqueued so far has run."""
        ...

    def acknowledge(self) -> None: ...


class _Done:
    """A `ReadBack` that is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrays = [tensor.numpy() for tensor in tensors]

    def done(self) -> bool:
        return True

    def wait(self) -> list[Array]:
        return self._arrays


class CpuDevice:
    """A `Device` on which every call does its work before it returns."""

    torch_device = torch.device("cpu")
    synchronous = True
    completion_fd: int | None = None

    def tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array)

    def copy(self, host: Tensor, target: Tensor) -> None:
        target.copy_(host)

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        return _Done(tensors)

    def acknowledge(self) -> None:
        pass


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
        self._used += -(-host.nbytes // _ALIGNMENT) * _ALIGNMENT
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


def device_of(device: torch.device) -> Device:
    """The way to work with this one."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()


class Fields:
    """Named arrays of one capacity that the host fills and the device reads: `host[name]`, and `device[name]` at an
    address that never changes. On a synchronous device they are the same memory, and `send` does nothing.
    """

    def __init__(self, device: Device, capacity: int, **dtypes: type[np.generic]) -> None:
        self._device = device
        sizes = [-(-capacity * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT for dtype in dtypes.values()]
        self._host_block = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._block = self._host_block if device.synchronous else self._host_block.clone().to(device.torch_device)
        self.host: dict[str, Array] = {}
        self.device: dict[str, Tensor] = {}
        offset = 0
        for (name, dtype), size in zip(dtypes.items(), sizes, strict=True):
            used = slice(offset, offset + capacity * np.dtype(dtype).itemsize)
            self.host[name] = self._host_block[used].numpy().view(dtype)
            self.device[name] = self._block[used].view(torch.from_numpy(self.host[name]).dtype)
            offset += size

    def send(self, count: int) -> None:
        """Bring the first `count` entries of every array to the device, before what is enqueued from now on."""
        if self._device.synchronous:
            return
        if len(self._host_block) <= _ONE_COPY_BYTES:
            self._device.copy(self._host_block, self._block)
            return
        for name, array in self.host.items():
            self._device.copy(torch.from_numpy(array[:count]), self.device[name][:count])
