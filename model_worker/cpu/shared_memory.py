"""Collectives of the ranks of one machine through memory that they share (native/ranks.h), instead of Gloo's sockets.

A reduction of a decode step's few kilobytes takes some microseconds, where one through a socket takes hundreds. The
memory is an anonymous file, which the kernel frees with the last process that has it: a killed rank leaves nothing.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.api import DTYPES, CpuKernels
from vibe_sgl_lite.model_worker.cpu.library import structures
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState

CAPACITY = 2 << 20  # bytes that a rank hands over at a time; a whole number of pages
PAGE = 4096
LINE = 64

log = logging.getLogger(__name__)


class SharedMemory:
    """A `vibe_sgl_lite.qwen3.layers.parallel_state.PeerCollectives`. Not for several threads of a rank at once."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, capacity: int, kernels: CpuKernels) -> None:
        self._bytes = np.frombuffer(memory, np.uint8)  # keeps it mapped
        self._size = size
        self._capacity = capacity
        self._kernels = kernels
        self.place = structures()["Ranks"](self._bytes.ctypes.data, rank, size, capacity)

    def takes(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> bool:
        """Sums of fp32 and bf16 of any size, and else what fits at once."""
        added = operation == dist.ReduceOp.SUM and x.dtype in DTYPES
        return x.device.type == "cpu" and x.is_contiguous() and (added or x.nbytes <= self._capacity)

    def all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """fp32 and bf16 are added in fp32, in the order of the ranks."""
        if operation == dist.ReduceOp.SUM and x.dtype in DTYPES:
            call = structures()["SumRanksCall"](DTYPES[x.dtype], self.place, x.data_ptr(), x.numel())
            self._kernels.call("SumRanksCall", call)
            return
        parts = self.all_gather(x.view(1, *x.shape))
        assert parts is not None
        if operation == dist.ReduceOp.SUM:
            torch.sum(parts, 0, dtype=x.dtype, out=x)
        else:
            (torch.amax if operation == dist.ReduceOp.MAX else torch.amin)(parts, 0, out=x)

    def all_gather(self, x: Tensor) -> Tensor | None:
        """[n, ...] of each rank -> [size * n, ...]; None where it does not fit at once."""
        x = x.contiguous()
        if x.device.type != "cpu" or x.nbytes > self._capacity:
            return None
        gathered = x.new_empty((self._size * x.shape[0], *x.shape[1:]))
        call = structures()["GatherRanksCall"](self.place, x.data_ptr(), x.nbytes, gathered.data_ptr())
        self._kernels.call("GatherRanksCall", call)
        return gathered


def share_memory(parallel: ParallelState, kernels: CpuKernels) -> ParallelState:
    """The same groups, with memory shared by each; all ranks call it together, all on one machine."""

    def shared(group: Group) -> Group:
        return replace(group, peers=_meet(group, kernels)) if group.size > 1 else group

    return replace(parallel, tp=shared(parallel.tp), ep=shared(parallel.ep), expert_tp=shared(parallel.expert_tp))


def _meet(group: Group, kernels: CpuKernels) -> SharedMemory | None:
    """The memory of `group`; None, on all of its ranks, if one of them cannot have it."""
    bytes_wanted = -(-group.size * LINE // PAGE) * PAGE + 2 * group.size * CAPACITY
    file, memory, problem = -1, None, ""
    try:
        if group.rank == 0:
            file = os.memfd_create("vibe-sgl-lite-ranks", os.MFD_CLOEXEC)
            os.ftruncate(file, bytes_wanted)
    except (OSError, AttributeError) as error:  # only Linux has it
        problem = str(error)
    process, number = group.all_gather(torch.tensor([[os.getpid(), file]])).tolist()[0]
    try:
        if group.rank != 0 and number >= 0:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        if file >= 0:
            memory = mmap.mmap(file, bytes_wanted)
    except OSError as error:
        problem = str(error)
    every_one = bool(group.all_reduce_min(torch.tensor([memory is not None])).item())
    if file >= 0:
        os.close(file)
    if every_one and memory is not None:
        return SharedMemory(memory, group.rank, group.size, CAPACITY, kernels)
    log.warning("no memory is shared by the ranks (%s): they use Gloo", problem or "another one cannot")
    return None
