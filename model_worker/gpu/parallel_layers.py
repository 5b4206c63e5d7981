"""A model's decoder layers on one of several GPUs: each sum over the ranks is one kernel with residual and norm."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, MoEBlock
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, PeerCollectives
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import DecoderLayer
from vibe_sgl_lite.qwen3.steps import run_block


@runtime_checkable
class FusedSums(PeerCollectives, Protocol):
    """Sums over the ranks with what follows them in a layer. For tensors that it takes."""

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> None:
        """residual += the sum over the ranks of `x`, which is spent. Both [T, N]."""
        ...

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        """The same; then x = residual / rms(residual) * weight, [N]."""
        ...


class ParallelLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers`. What the peers do not take goes through the group."""

    def __init__(self, layers: list[DecoderLayer], group: Group, peers: FusedSums, operations: LayerOperations) -> None:
        self.layers = layers
        self.group = group
        self.peers = peers
        self.operations = operations

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        partial = False  # whether `update` is still to be summed over the ranks
        for layer in self.layers:
            x = self._add_norm(update, residual, layer.attention_norm, partial=partial)
            x = run_block(layer.attention.steps[:-1], x, residual, context)
            update = layer.attention.output.partial(x, context.attributes)
            x = self._add_norm(update, residual, layer.feed_forward_norm, partial=True)
            update, partial = _feed_forward(layer.feed_forward, x, residual, context)
        return self.group.all_reduce(update) if partial else update

    def _add_norm(self, update: Tensor, residual: Tensor, norm: RMSNorm, *, partial: bool) -> Tensor:
        """residual += update, in place, summed over the ranks if it is one's part; returns the norm of the sum."""
        if partial and self.peers.takes(update):
            self.peers.all_reduce_add_norm(update, residual, norm.weight.tensor, norm.eps)
            return update
        total = self.group.all_reduce(update) if partial else update
        return self.operations.add_rms_norm(total, residual, norm.weight.tensor, norm.eps)


def _feed_forward(block: MLP | MoEBlock, x: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, bool]:
    """Its output, and whether that is only this rank's part."""
    if isinstance(block, MLP):
        return block.down.partial(run_block(block.steps[:-1], x, residual, context), context.attributes), True
    if isinstance(block.dispatch, AllReduceDispatch):
        return block.dispatch.partial(x, block.router, block.experts, context.timer), True
    return block(x, context.timer, context.attributes), False
