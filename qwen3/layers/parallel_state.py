"""Where this rank stands among the others: process groups as plain values, passed in and never global.

There are `tp` ranks. Attention and dense MLPs are split over all of them (`tp`). Experts are split over `ep` of them
(`ep`), and each expert over the ranks that hold the same experts (`expert_tp`, tp / ep of them). Rank r has expert
group r // expert_tp.size and part r % expert_tp.size of each of its experts.

Knows nothing of rendezvous and backends: `model_worker` constructs these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

# torch 2.13 has a new name for it, and warns of the old one, on which earlier versions depend.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PeerCollectives(Protocol):
    """Collectives that the ranks of one machine do in memory which all of them reach. All ranks call the same ones, in
    the same order, and what these do not take is torch.distributed's."""

    def takes(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> bool:
        """Whether it can reduce such a tensor."""
        ...

    def all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """x becomes the sum, maximum or minimum over the ranks."""
        ...

    def all_gather(self, x: Tensor) -> Tensor | None:
        """As `Group.all_gather`; None if it does not take this."""
        ...


@dataclass(frozen=True)
class Group:
    """This rank's place in one process group. Size 1 needs no torch.distributed: every collective is then a no-op.

    peers: a faster way for what it takes, if there is one.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    peers: PeerCollectives | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size
        assert self.size == 1 or self.process_group is not None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the group, in place; returns `x`, which must be contiguous."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Maximum over the group, in place; returns `x`, which must be contiguous."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def all_reduce_min(self, x: Tensor) -> Tensor:
        """Minimum over the group, in place; returns `x`, which must be contiguous."""
        return self._reduce(x, dist.ReduceOp.MIN)

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.peers is not None and self.peers.takes(x, operation):
            self.peers.all_reduce(x, operation)
        elif self.size > 1:
            dist.all_reduce(x, op=operation, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each rank, the same n everywhere -> [size * n, ...] in rank order."""
        if self.size == 1:
            return x
        if self.peers is not None and (parts := self.peers.all_gather(x)) is not None:
            return parts
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather_into(gathered, x.contiguous(), group=self.process_group)
        return gathered

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Send the first send_rows[0] rows of `x` to rank 0, the next send_rows[1] to rank 1, ...

        Returns [sum(receive_rows), ...], the rows received in rank order; receive_rows[r] is what rank r sends here.
        """
        if self.size == 1:
            return x
        received = x.new_empty((sum(receive_rows), *x.shape[1:]))
        dist.all_to_all_single(received, x.contiguous(), list(receive_rows), list(send_rows), group=self.process_group)
        return received


@dataclass(frozen=True)
class ParallelState:
    """All groups of one rank; the default is a single rank. `tp` holds every rank, `ep` x `expert_tp` the same ones."""

    rank: int = 0
    tp: Group = field(default_factory=Group)
    ep: Group = field(default_factory=Group)
    expert_tp: Group = field(default_factory=Group)

    def __post_init__(self) -> None:
        assert self.tp.size == self.ep.size * self.expert_tp.size
        assert self.tp.rank == self.ep.rank * self.expert_tp.size + self.expert_tp.rank


def shard(total: int, group: Group) -> slice:
    """This rank's equal, contiguous part of `total` things; `total` must be divisible (checked before ranks start)."""
    assert total % group.size == 0, f"{total} is not divisible by {group.size}"
    size = total // group.size
    return slice(group.rank * size, (group.rank + 1) * size)


def spread(total: int, group: Group) -> slice:
    """This rank's contiguous part of `total` things, which may be one fewer than another's: Qwen3-Embedding's
    vocabularies are odd. The last rank has the most."""
    return slice(total * group.rank // group.size, total * (group.rank + 1) // group.size)


def kv_head_shard(num_kv_heads: int, group: Group) -> slice:
    """The KV heads of this rank: an equal part, or one head shared with its neighbours if ranks exceed heads."""
    if num_kv_heads >= group.size:
        return shard(num_kv_heads, group)
    assert group.size % num_kv_heads == 0, f"{group.size} ranks cannot share {num_kv_heads} KV heads evenly"
    head = group.rank * num_kv_heads // group.size
    return slice(head, head + 1)
