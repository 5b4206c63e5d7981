"""A device that works in its own time, on tensors of the CPU; and graphs that do again what they were captured of."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vibe_sgl_lite.model_worker.attention.torch_backend import TorchAttention
from vibe_sgl_lite.model_worker.compute import Compute
from vibe_sgl_lite.model_worker.device import Array
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.model_worker.sampling.sampler import FusedDraw
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations

Result = TypeVar("Result")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeReadBack:
    def __init__(self, device: "FakeDevice", tensors: Sequence[Tensor]) -> None:
        self._device = device
        self._values = [tensor.clone().numpy() for tensor in tensors]
        self.done_at = device.busy_until

    def done(self) -> bool:
        return self._device.clock.now >= self.done_at

    def wait(self) -> list[Array]:
        self._device.events.append(f"wait {self._device.read_backs.index(self)}")
        self._device.clock.now = max(self._device.clock.now, self.done_at)
        return self._values


class FakeDevice:
    """A `Device` whose steps take `step_s` each, one after another. events: what was asked of it, in order.

    Each `read_back` ends a step. What is enqueued is computed at once, but the host learns of it when its time comes.
    """

    torch_device = torch.device("cpu")
    synchronous = False

    def __init__(self, clock: Clock, step_s: float = 10.0) -> None:
        self.clock = clock
        self.step_s = step_s
        self.busy_until = 0.0
        self.events: list[str] = []
        self.read_backs: list[FakeReadBack] = []
        self.completion_fd: int | None = None

    def tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).clone()

    def copy(self, host: Tensor, target: Tensor) -> None:
        target.copy_(host)

    def read_back(self, tensors: Sequence[Tensor]) -> FakeReadBack:
        self.busy_until = max(self.busy_until, self.clock.now) + self.step_s
        self.events.append(f"launch {len(self.read_backs)}")
        self.read_backs.append(FakeReadBack(self, tensors))
        return self.read_backs[-1]

    def acknowledge(self) -> None:
        pass


class NothingIsRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, operations whose result the host has to wait for fail."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allowed = allowed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS or name in self._allowed, f"{name} makes the host wait for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{name} with a mask makes the host wait for the device"
        return func(*args, **(kwargs or {}))


class FakeGraphs:
    """`StepGraphs` whose replay runs the captured call again: over the tensors that it had then, into those that it
    returned then, as a graph does."""

    def __init__(self, row_buckets: Sequence[int]) -> None:
        self.row_buckets = row_buckets
        self.chunk_buckets: Sequence[tuple[int, int]] = ()
        self.captured: dict[Hashable, tuple[Callable[[], Any], Any]] = {}
        self.replayed: list[Hashable] = []
        self._capturing = False

    def run(self, key: Hashable, work: Callable[[], Result]) -> Result:
        if key in self.captured:
            self.replayed.append(key)
            again, result = self.captured[key]
            for old, new in zip(_tensors(result), _tensors(again()), strict=True):
                old.copy_(new)
            return result  # type: ignore[no-any-return]
        result = work()
        if self._capturing:
            self.captured[key] = work, result
        return result

    @contextmanager
    def capturing(self) -> Iterator[None]:
        self._capturing = True
        yield
        self._capturing = False


def _tensors(result: Any) -> list[Tensor]:
    fields = [result] if isinstance(result, Tensor) else vars(result).values()
    return [field for field in fields if isinstance(field, Tensor)]


class GraphedAttention(TorchAttention):
    """Plain torch attention that lets its steps be captured."""

    def graph_key(self, batch: DeviceBatch) -> Hashable | None:
        return "short" if batch.max_context <= 16 else "long"

    def graph_contexts(self) -> Sequence[int]:
        return (16, 17)


def fake_compute(device: FakeDevice, graphs: FakeGraphs | None = None, fused_draw: FusedDraw | None = None) -> Compute:
    """Plain torch whose steps can be captured, on that device."""
    return Compute("fake", TorchOperations(), GraphedAttention, device=device, graphs=graphs, fused_draw=fused_draw)
