"""How long kernels of a GPU take in a graph, and having them compiled before."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

import torch
from triton.backends.compiler import GPUTarget


class NoCard:
    """A `triton.runtime.driver` that has nothing to launch on, for kernels that are compiled for compute capability 9.0
    alone."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def seconds(work: Callable[[int], None], count: int) -> float:
    """Of one `work` of `count`, called with their numbers and replayed in one graph; the least of ten."""
    for number in range(count):
        work(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            work(number)
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / count)
    return best


def compile_beforehand(work: dict[str, Callable[[], object]], jobs: int) -> None:
    """Call each once, in so many processes, so that the cache of Triton has its kernel. No GPU may be in use yet.

    work: by names, under which what fails is told; it is told again when it is measured.
    """
    children = []
    for job in range(jobs):
        child = os.fork()
        if child == 0:
            _call(list(work.items())[job::jobs])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _call(work: Iterable[tuple[str, Callable[[], object]]]) -> None:
    for name, call in work:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever Triton's compiler or the card makes of a cut
            sys.stderr.write(f"  {name}: {error!r:.120}\n")
    torch.cuda.synchronize()
