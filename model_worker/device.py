"""How the host hands a step to a device and gets its results: at once on a CPU, behind the host's back on a GPU.

On a GPU nothing here waits but `ReadBack.wait`: the host's arrays are copied to pinned memory, which torch keeps until
the copy from there is done, and everything else is enqueued on the current stream.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
ALIGNMENT = 16  # bytes
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


class Fields:
    """Named arrays of one capacity that the host fills and the device reads: `host[name]`, and `device[name]` at an
    address that never changes. On a synchronous device they are the same memory, and `send` does nothing.
    """

    def __init__(self, device: Device, capacity: int, **dtypes: type[np.generic]) -> None:
        self._device = device
        sizes = [-(-capacity * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT for dtype in dtypes.values()]
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
