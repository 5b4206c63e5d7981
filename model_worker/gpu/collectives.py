"""Sums over the ranks of one machine without NCCL: through memory of each card that the others can read.

A sum of few rows takes NCCL some 10 microseconds, most of it spent meeting; these take 3 to 5, and what follows a sum
in a layer is in the same kernel (kernels/all_reduce.py). NVLink's multicast is not used. What is too large, of another
kind or between machines stays with NCCL.
"""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import (
    MAX_COLUMNS,
    MAX_RANKS,
    Layout,
    Outbox,
    all_gather,
    all_reduce,
)
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch

HALF_BYTES = 32 << 20  # of the largest sum; above it NCCL is as fast
SMALL_BYTES = 1 << 20  # up to here, rows are sent
TWO_SHOT_BYTES = 256 << 10  # over three ranks or more, from here on each sums a share; over two both read as much
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

log = logging.getLogger(__name__)


class PeerMemory:
    """A `FusedSums` (parallel_layers.py): this rank's region, and where the others' are.

    Every call is the next one on all ranks, in the same order, whether by itself or from a graph.
    """

    def __init__(self, addresses: list[int], rank: int, layout: Layout, device: torch.device, keep: Any) -> None:
        """addresses: of the regions, zeroed, of `layout`, as this rank sees them; keep: what they live as long as."""
        self._regions = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._calls = torch.zeros(1, dtype=torch.int64, device=device)
        self._rank = rank
        self.outbox: Outbox | None = Outbox(self._regions, self._calls, layout, rank)
        self.layout = layout
        self._keep = keep
        self._pdl = has_dependent_launch(device)

    def takes(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> bool:
        if operation != dist.ReduceOp.SUM:
            return False
        line = x.shape[-1] * x.element_size()
        fits = 0 < x.nbytes <= self.layout.half and line % 16 == 0 and x.shape[-1] <= MAX_COLUMNS
        return fits and x.dtype in FLOATS and x.is_contiguous()

    def all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        self._reduce(x)

    def all_gather(self, x: Tensor) -> Tensor | None:
        if not x.is_contiguous() or x.nbytes % 4 or not 0 < x.nbytes <= self.layout.small:
            return None
        gathered = x.new_empty((len(self._regions) * x.shape[0], *x.shape[1:]))
        all_gather(x, gathered, self._regions, self._calls, self.layout, self._rank, pdl=self._pdl)
        return gathered

    def all_reduce_add(self, x: Tensor, residual: Tensor, *, sent: bool) -> None:
        self._reduce(x, residual=residual, sent=sent)

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, sent: bool) -> None:
        self._reduce(x, residual=residual, weight=weight, eps=eps, sent=sent, beside=sent)

    def _reduce(self, x: Tensor, **rest: Any) -> None:
        two_shot = len(self._regions) > 2 and x.nbytes >= TWO_SHOT_BYTES
        lines = x.view(-1, x.shape[-1])
        all_reduce(lines, self._regions, self._calls, self.layout, self._rank, pdl=self._pdl, two_shot=two_shot, **rest)


def connect_peers(rank: int, size: int, device: torch.device) -> PeerMemory | None:
    """The ranks of this machine, which are all of the default group, with each other; all of them call it together.

    None, on all of them, where the cards cannot read each other's memory. Uses torch's symmetric memory.
    """
    others = [card for card in range(torch.cuda.device_count()) if card != device.index]
    reached = size <= MAX_RANKS and len(others) >= size - 1
    reached = reached and all(torch.cuda.can_device_access_peer(device, card) for card in others[: size - 1])
    peers = None
    if _all_agree(reached, device):
        try:
            peers = _connect(rank, device)
        except RuntimeError as error:
            log.warning("no symmetric memory: %s", error)
        if _all_agree(peers is not None, device):  # so no rank writes to a region before it is zeroed
            return peers
    log.warning("the GPUs cannot read each other's memory: all sums over ranks go through NCCL")
    return None


def _connect(rank: int, device: torch.device) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    world = dist.group.WORLD
    assert world is not None
    layout = Layout(HALF_BYTES, SMALL_BYTES, dist.get_world_size())
    region = symmetric.empty(layout.nbytes, dtype=torch.uint8, device=device)
    region.zero_()
    handle = symmetric.rendezvous(region, world.group_name)
    torch.cuda.synchronize(device)
    return PeerMemory(list(handle.buffer_ptrs), rank, layout, device, (region, handle))


def _all_agree(yes: bool, device: torch.device) -> bool:
    answer = torch.tensor([int(yes)], dtype=torch.int32, device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())
