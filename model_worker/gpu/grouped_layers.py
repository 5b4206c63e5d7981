"""Decode steps of few rows of a model whose matrices are kept as codes (grouped_matrix.py): five kernels a layer, as
fused_layers.py has them for plain ones; the norms, SiLU and the residual sums are in the products."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.attention_backend import AttentionPaths, GpuAttention, GpuMetadata
from vibe_sgl_lite.model_worker.gpu.grouped_matrix import GroupedMatrix
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import FEW_CHAIN_ROWS
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_gemv import GEMV_OUTPUTS, grouped_gemv, takes_rows
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import grouped_product
from vibe_sgl_lite.model_worker.gpu.kernels.product import begin_stream
from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import DecoderLayer, Qwen3

FUSED_ROWS = 16  # at most; with more of them the kernels around products take little of a step


@dataclass(frozen=True)
class GroupedLayer:
    """As fused_layers.py's `LayerWeights`."""

    qkv: GroupedMatrix
    output: GroupedMatrix
    gate_up: GroupedMatrix
    down: GroupedMatrix
    attention_norm: RMSNorm
    query_norm: RMSNorm
    key_norm: RMSNorm
    feed_forward_norm: RMSNorm

    @classmethod
    def of(cls, layer: DecoderLayer) -> "GroupedLayer | None":
        """None where some matrix is another one."""
        attention, mlp = layer.attention, layer.feed_forward
        if not isinstance(mlp, MLP):
            return None
        holders = attention.qkv.weight, attention.output.weight, mlp.gate_up.weight, mlp.down.weight
        qkv, output, gate_up, down = (_grouped(holder) for holder in holders)
        if qkv is None or output is None or gate_up is None or down is None or gate_up.codes.outputs % 64:
            return None
        norms = layer.attention_norm, attention.query_norm, attention.key_norm, layer.feed_forward_norm
        return cls(qkv, output, gate_up, down, *norms)


def _grouped(holder: MatrixWeight) -> GroupedMatrix | None:
    return holder.matrix if isinstance(holder.matrix, GroupedMatrix) else None


class GroupedLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers` whose metadata is `GpuMetadata`; on one rank."""

    def __init__(self, layers: list[DecoderLayer], grouped: list[GroupedLayer], attention: GpuAttention) -> None:
        self.layers = layers
        self.grouped = grouped
        self.attention = attention

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        metadata: GpuMetadata = context.metadata
        if metadata.chunks is None and len(update) <= FUSED_ROWS:
            return self._decode(update, context)
        for layer in self.layers:
            update = layer(update, residual, context)
        return update

    def _decode(self, stream: Tensor, context: ForwardContext) -> Tensor:
        """stream: [R, H], the embedding; becomes the sum of all layers, to which nothing is left to be added."""
        rows, pdl = len(stream), self.attention.pdl
        inner = stream.new_empty((rows, self.grouped[0].down.codes.inputs))
        qkv = stream.new_empty((rows, self.grouped[0].qkv.codes.outputs))
        gained = torch.empty_like(stream)
        squares = stream.new_empty((rows, 1), dtype=torch.float32)
        begin_stream(stream, self.grouped[0].attention_norm.weight.tensor, gained, squares, pdl=pdl)
        mark = context.timer.mark
        for number, layer in enumerate(self.grouped):
            mark("qkv")
            _normed(gained, squares, layer.attention_norm, layer.qkv, qkv, pdl=pdl)
            mark("attention")
            attended = self.attention.forward(
                number, qkv, layer.query_norm, layer.key_norm, context.angles, context.metadata
            )
            mark("o")
            squares = _added(attended, layer.output, stream, layer.feed_forward_norm, gained, pdl=pdl)
            mark("gate_up")
            _normed(gained, squares, layer.feed_forward_norm, layer.gate_up, inner, pdl=pdl, silu=True)
            mark("down")
            following = self.grouped[min(number + 1, len(self.grouped) - 1)].attention_norm  # of the last not used
            squares = _added(inner, layer.down, stream, following, gained, pdl=pdl)
        return stream


def plan_grouped(model: Qwen3, attention: GpuAttention) -> None:
    """Give `model`, whose weights are loaded, these layers, if all of its matrices are such and on one rank."""
    grouped = [layer for layer in map(GroupedLayer.of, model.layers) if layer is not None]
    if len(grouped) == len(model.layers) and model.parallel.tp.size == 1:
        model.all_layers = GroupedLayers(model.layers, grouped, attention)
        attention.paths = AttentionPaths(chain_rows=0 if attention.fixed_order else FEW_CHAIN_ROWS)


def _normed(
    gained: Tensor, squares: Tensor, norm: RMSNorm, matrix: GroupedMatrix, output: Tensor, *, pdl: bool,
    silu: bool = False,
) -> None:  # fmt: skip
    if takes_rows(gained):
        grouped_gemv(
            gained, matrix.codes, output, matrix.gemv, matrix.scratch, pdl=pdl, squares=squares, eps=norm.eps, silu=silu
        )  # fmt: skip
    else:
        tiles = matrix.tiles(len(gained))
        grouped_product(
            gained, matrix.codes, output, tiles, matrix.scratch, pdl=pdl, squares=squares, eps=norm.eps, silu=silu
        )  # fmt: skip


def _added(x: Tensor, matrix: GroupedMatrix, stream: Tensor, norm: RMSNorm, gained: Tensor, *, pdl: bool) -> Tensor:
    """The stream's new sums of squares."""
    one, tiles = takes_rows(x), matrix.tiles(len(x))
    width = GEMV_OUTPUTS if one else tiles.outputs
    squares = x.new_empty((len(x), -(-matrix.codes.outputs // width)), dtype=torch.float32)
    if one:
        grouped_gemv(
            x, matrix.codes, stream, matrix.gemv, matrix.scratch, pdl=pdl, gain=norm.weight.tensor, gained=gained,
            new_squares=squares,
        )  # fmt: skip
    else:
        grouped_product(
            x, matrix.codes, stream, tiles, matrix.scratch, pdl=pdl, gain=norm.weight.tensor, gained=gained,
            new_squares=squares,
        )  # fmt: skip
    return squares
