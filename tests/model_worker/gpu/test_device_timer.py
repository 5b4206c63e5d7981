"""A step's parts by events of a stream that runs behind the host's back; here one that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vibe_sgl_lite.model_worker.gpu.device_timer import DeviceTimer
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER


class Stream:
    """Work in order: its time goes on only in `finish`. capturing: what is enqueued becomes `graph` instead."""

    def __init__(self) -> None:
        self.host, self.device = 100.0, 100.0
        self.queue: list[Callable[[], None]] = []
        self.capturing = False
        self.graph: list[Callable[[], None]] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.graph if self.capturing else self.queue).append(work)

    def kernel(self, seconds: float) -> None:
        def run() -> None:
            self.device += seconds

        self.enqueue(run)

    def finish(self) -> None:
        self.device = max(self.device, self.host)
        for work in self.queue:
            work()
        self.queue.clear()
        self.host = max(self.host, self.device)

    def capture(self, work: Callable[[], None]) -> None:
        """As `CudaGraphs.run` does: once to compile, once captured."""
        work()
        self.finish()
        self.capturing = True
        work()
        self.capturing = False

    def replay(self, work: Callable[[], None]) -> None:
        self.queue += self.graph


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, -1.0

    def record(self) -> None:
        def run() -> None:
            self.at = self.stream.device

        self.stream.enqueue(run)

    def synchronize(self) -> None:
        self.stream.finish()

    def elapsed_time(self, end: Event) -> float:
        assert 0 <= self.at <= end.at, "not recorded"
        return (end.at - self.at) * 1e3


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def timer(stream: Stream) -> DeviceTimer:
    return DeviceTimer(lambda: stream.host, lambda: Event(stream))


def call(work: Callable[[], None]) -> None:
    work()


def test_parts_of_a_step_are_the_devices_times(stream: Stream, timer: DeviceTimer) -> None:
    def forward() -> None:
        stream.host += 0.25  # asking takes a while, in which the device already works
        for part, seconds in (("qkv", 1), ("attention", 4), ("qkv", 2)):
            timer.mark(part)
            stream.kernel(seconds)

    timer.mark("apply")
    stream.host += 3
    timer.on_device(None, forward, call)
    timer.mark("sampling")  # outside of what could be captured
    stream.kernel(0.5)
    timer.mark(OTHER)
    stream.finish()
    stream.host += 0.75  # until somebody looks
    taken = timer.take()
    assert taken == pytest.approx({"apply": 3, "qkv": 3, "attention": 4, "sampling": 0.5, OTHER: 1.0})
    timer.mark("send")
    stream.host += 2
    assert timer.take() == {"send": 2}  # between steps it is the host's time again


def test_a_captured_forward_is_timed_at_each_replay(stream: Stream, timer: DeviceTimer) -> None:
    slowness = [1.0]

    def forward() -> None:
        for part in ("head", "sampling"):
            timer.mark(part)
            stream.enqueue(lambda: setattr(stream, "device", stream.device + slowness[0]))

    timer.on_device("key", forward, stream.capture)
    timer.take()  # what capturing took is nobody's
    for seconds in (2.0, 5.0):
        slowness[0] = seconds
        timer.on_device("key", forward, stream.replay)
        stream.finish()
        assert timer.take() == pytest.approx({"head": seconds, "sampling": seconds})


def test_a_forward_that_fails_spoils_nothing_of_the_next(stream: Stream, timer: DeviceTimer) -> None:
    def forward(seconds: float) -> None:
        timer.mark("qkv")
        stream.kernel(seconds)
        if seconds == 1:
            raise ValueError("by its kernels")

    with pytest.raises(ValueError, match="by its kernels"):
        timer.on_device(None, lambda: forward(1), call)
    timer.mark(OTHER)
    timer.take()
    timer.on_device(None, lambda: forward(2), call)
    assert timer.take() == pytest.approx({"qkv": 2})
