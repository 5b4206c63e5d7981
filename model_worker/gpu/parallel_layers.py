"""A model's decoder layers on one of several GPUs: each sum over the ranks is one kernel with residual and norm.

The products before it send what is to be summed by themselves, where they can (kernels/rank_product.py).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox
from vibe_sgl_lite.model_worker.gpu.rank_products import RankProducts
from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.linear import RowParallelLinear
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, MoEBlock
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, PeerCollectives
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import DecoderLayer


@runtime_checkable
class FusedSums(PeerCollectives, Protocol):
    """Sums over the ranks with what follows them in a layer. For tensors that it takes."""

    outbox: Outbox | None
    """For kernels that send what the next sum is of, while they make it."""

    def all_reduce_add(self, x: Tensor, residual: Tensor, *, sent: bool) -> None:
        """residual += the sum over the ranks of `x`, which is spent. Both [T, N]. sent: by way of the outbox."""
        ...

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, sent: bool) -> None:
        """The same; then x = residual / rms(residual) * weight, [N]."""
        ...


@dataclass(frozen=True)
class Update:
    """What is to be added to the residual stream, [T, H]. partial: it is this rank's part of a sum. sent: that is sent
    to the others already."""

    x: Tensor
    partial: bool = False
    sent: bool = False


class ParallelLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers`. What the peers do not take goes through the group."""

    def __init__(
        self,
        layers: list[DecoderLayer],
        group: Group,
        peers: FusedSums,
        operations: LayerOperations,
        products: RankProducts,
    ) -> None:
        self.layers = layers
        self.group = group
        self.peers = peers
        self.operations = operations
        self.products = products
        last = layers[-1].feed_forward
        self._last = last.down if isinstance(last, MLP) else None  # its sum is the group's

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        new, mark = Update(update), context.timer.mark
        for layer in self.layers:
            attention = layer.attention
            mark("norm")
            x = self._add_norm(new, residual, layer.attention_norm)
            mark("qkv")
            x = self.products.multiply(x, attention.qkv.weight)
            mark("attention")
            x = attention.steps[1](x, residual, context)
            mark("o")
            new = self._part(x, attention.output)
            mark("norm")
            x = self._add_norm(new, residual, layer.feed_forward_norm)
            new = self._feed_forward(layer.feed_forward, x, context)
        return self.group.all_reduce(new.x) if new.partial else new.x

    def _add_norm(self, update: Update, residual: Tensor, norm: RMSNorm) -> Tensor:
        """residual += update, in place, summed over the ranks if it is one's part; returns the norm of the sum."""
        x, weight = update.x, norm.weight.tensor
        if update.partial and self.peers.takes(x):
            self.peers.all_reduce_add_norm(x, residual, weight, norm.eps, sent=update.sent)
            return x
        total = self.group.all_reduce(x) if update.partial else x
        return self.operations.add_rms_norm(total, residual, weight, norm.eps)

    def _feed_forward(self, block: MLP | MoEBlock, x: Tensor, context: ForwardContext) -> Update:
        if isinstance(block, MLP):
            context.timer.mark("gate_up")
            x = self.products.multiply_silu(x, block.gate_up.weight)
            context.timer.mark("down")
            return self._part(x, block.down)
        if isinstance(block.dispatch, AllReduceDispatch):
            return Update(block.dispatch.partial(x, block.router, block.experts, context.timer), partial=True)
        return Update(block(x, context.timer))

    def _part(self, x: Tensor, linear: RowParallelLinear) -> Update:
        outbox = None if linear is self._last else self.peers.outbox
        x, sent = self.products.multiply_and_send(x, linear.weight, outbox)
        return Update(x, partial=True, sent=sent)
