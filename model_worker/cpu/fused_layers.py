"""Lets a model run all its layers as one call of the CPU kernels, where they can.

They can on one rank, for a dense model whose matrices are all theirs. Between ranks each block ends in a collective,
and experts are chosen between two operations: there, every operation is a call of its own.
"""

from torch import Tensor

from vibe_sgl_lite.model_worker.attention.cpu_backend import SPLIT_TOKENS, KernelAttention
from vibe_sgl_lite.model_worker.cpu import LayerCache
from vibe_sgl_lite.model_worker.cpu.layers import PARTS, KernelLayers, LayerWeights
from vibe_sgl_lite.model_worker.cpu.linear import SLAB, SlabWeights
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.qwen3.attention_backend import AttentionBackend, ForwardContext
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import DecoderLayer, Qwen3


class FusedLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers` whose metadata is a `DeviceBatch`."""

    def __init__(self, layers: KernelLayers) -> None:
        self.layers = layers

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        batch: DeviceBatch = context.metadata
        if context.timer.measures and self.layers.seconds is None:
            self.layers.measure()
        self.layers(
            update,
            residual,
            context.angles.cos,
            context.angles.sin,
            batch.slot_mapping,
            batch.query_start,
            batch.context_lengths,
            batch.page_table,
        )
        if self.layers.seconds is not None:
            context.timer.spread(PARTS * len(self.layers.seconds), self.layers.seconds.ravel().tolist)
        return update


def fuse_layers(model: Qwen3, backend: AttentionBackend) -> None:
    """Give `model`, whose weights are loaded, the one call, if there is one for it."""
    if not isinstance(backend, KernelAttention) or model.parallel.tp.size > 1:
        return
    layers = [_weights(layer, cache) for layer, cache in zip(model.layers, backend.caches, strict=True)]
    if None in layers:
        return
    kernel_layers = KernelLayers(
        backend.kernels,
        [layer for layer in layers if layer is not None],
        eps=model.norm.eps,
        scale=backend.scale,
        split_tokens=SPLIT_TOKENS,
    )
    model.all_layers = FusedLayers(kernel_layers)


def _weights(layer: DecoderLayer, cache: LayerCache) -> LayerWeights | None:
    """A layer as the kernels take it; None if they do not."""
    attention, feed_forward = layer.attention, layer.feed_forward
    if not isinstance(feed_forward, MLP):
        return None
    holders = (attention.qkv.weight, attention.output.weight, feed_forward.gate_up.weight, feed_forward.down.weight)
    slabs = [_slabs(holder) for holder in holders]
    qkv, output, gate_up, down = slabs
    if qkv is None or output is None or gate_up is None or down is None or down.inputs % SLAB:
        return None
    return LayerWeights(
        qkv,
        output,
        gate_up,
        down,
        layer.attention_norm.weight.tensor,
        attention.query_norm.weight.tensor,
        attention.key_norm.weight.tensor,
        layer.feed_forward_norm.weight.tensor,
        cache,
    )


def _slabs(holder: MatrixWeight) -> SlabWeights | None:
    matrix = holder.matrix
    return matrix.weights if isinstance(matrix, SlabMatrix) and not matrix.padding else None
