"""Captured CUDA graphs of whole steps of decode rows: the host then enqueues one thing, not hundreds."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
PROMPT_BUCKETS = (16, 32, 64, 128, 256, 512)


def row_buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows to capture steps for, up to `most`: all up to 4, then steps of at most an eighth or 16."""
    buckets = [1, 2, 3, 4, 6, 8, 12, *range(16, 64, 8), *range(64, most, 16)]
    return tuple(sorted({min(bucket, most) for bucket in (*buckets, most)}))


class CudaGraphs:
    """A `StepGraphs` (model_worker/device_batch.py). All graphs share one pool of memory: none runs beside another."""

    def __init__(self, row_buckets: Sequence[int], prompt_buckets: Sequence[int] = PROMPT_BUCKETS) -> None:
        self.row_buckets = row_buckets
        self.prompt_buckets = prompt_buckets
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None
        self._capturing = False

    def run(self, key: Hashable, work: Callable[[], Result]) -> Result:
        if key in self._graphs:
            graph, result = self._graphs[key]
            graph.replay()
            return result  # type: ignore[no-any-return]
        if not self._capturing:
            return work()
        result = work()  # compiles kernels and fills caches, which may not happen while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        self._graphs[key] = graph, result
        return result

    @contextmanager
    def capturing(self) -> Iterator[None]:
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
