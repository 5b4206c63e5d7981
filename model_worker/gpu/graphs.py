"""Captured CUDA graphs of whole steps: the host then enqueues one thing, not hundreds."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device_batch import ChunkBucket
from vibe_sgl_lite.runtime.settings.step_sizes import step_sizes

Result = TypeVar("Result")
FEW_TOKENS, FEW_ROWS = 512, (4, 64)


def row_buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows to capture steps for, up to `most`: all up to 4, then steps of at most an eighth or 16."""
    buckets = [1, 2, 3, 4, 6, 8, 12, *range(16, 64, 8), *range(64, most, 16)]
    return tuple(sorted({min(bucket, most) for bucket in (*buckets, most)}))


def chunk_buckets(most_tokens: int, most_rows: int) -> tuple[ChunkBucket, ...]:
    """Tokens and rows of steps with chunks to capture: of the numbers that the scheduler makes steps for.

    Few rows only beside few tokens: else what rows cost that are not there is little to what tokens cost.
    """
    return tuple(
        (count, rows)
        for count in step_sizes(most_tokens)
        for rows in sorted({min(rows, most_rows, count) for rows in (*FEW_ROWS, most_rows)})
        if count <= FEW_TOKENS or rows == most_rows
    )


class CudaGraphs:
    """A `StepGraphs` (model_worker/device_batch.py). All graphs share one pool of memory: none runs beside another."""

    def __init__(self, row_buckets: Sequence[int], chunk_buckets: Sequence[ChunkBucket]) -> None:
        self.row_buckets = row_buckets
        self.chunk_buckets = chunk_buckets
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
        work()  # compiles kernels and fills caches, which may not happen while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # NCCL's own thread looks at events of earlier collectives meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._graphs[key] = graph, lend(result)
        return self._graphs[key][1]  # type: ignore[no-any-return]

    @contextmanager
    def capturing(self) -> Iterator[None]:
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False


@dataclass(frozen=True)
class _Memory:
    """Bytes on a card, as torch takes over without owning them."""

    __cuda_array_interface__: dict[str, Any]


def lend(result: Any) -> Any:
    """The same tensor, or dataclass with tensors, that keeps no memory: so that graphs captured later use it too.

    What a graph made is read before another one runs; and the pool itself lives as long as its graphs.
    """
    if is_dataclass(result) and not isinstance(result, type):
        parts = {field.name: lend(getattr(result, field.name)) for field in fields(result)}
        return replace(result, **parts)
    if not isinstance(result, Tensor) or result.numel() == 0:
        return result
    assert result.is_contiguous()
    memory = {"shape": (result.nbytes,), "typestr": "|u1", "data": (result.data_ptr(), False), "version": 2}
    return torch.as_tensor(_Memory(memory), device=result.device).view(result.dtype).view(result.shape)
