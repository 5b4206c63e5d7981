"""A model's decoder layers on a GPU: five kernels each for steps that decode (fused_layers.py), else one by one.

For a few rows these are a chain of their own. Such a step is as long as its weights take to be read, if nothing else
takes time: so each kernel has its weights on their way when the one before it ends. The norms are in the products, the
residual is added by them, and attention does all between two of them (kernels/gemv.py, kernels/chain_attention.py).
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.attention_backend import AttentionPaths, GpuAttention, GpuMetadata
from vibe_sgl_lite.model_worker.gpu.experts import plan_experts
from vibe_sgl_lite.model_worker.gpu.fused_layers import FusedLayers, LayerWeights, plan_tiles
from vibe_sgl_lite.model_worker.gpu.grouped_layers import GroupedLayers, plan_grouped
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import CHAIN_ROWS, FEW_CHAIN_ROWS
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import begin
from vibe_sgl_lite.model_worker.gpu.kernels.gemv import gemv
from vibe_sgl_lite.model_worker.gpu.parallel_layers import FusedSums, ParallelLayers
from vibe_sgl_lite.model_worker.gpu.rank_products import RankProducts
from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import DecoderLayer, Qwen3

WIDE = 5120  # hidden size from which the products of a rank take the rows that are more than a few


@dataclass(frozen=True)
class Product:
    """A matrix, and how its product is cut: rows of the matrix a program, and warps."""

    matrix: Tensor
    block: int
    warps: int

    @classmethod
    def of(cls, matrix: Tensor, elements: int, warps: int) -> "Product":
        """elements: of the matrix that a thread holds; measured on an H100 at the 0.6B shape."""
        block = elements * warps * 32 // triton.next_power_of_2(matrix.shape[1])
        return cls(matrix, min(max(block, 1), triton.next_power_of_2(matrix.shape[0])), warps)


@dataclass(frozen=True)
class ChainLayer:
    """How one layer's products are cut for the chain."""

    weights: LayerWeights
    qkv: Product
    output: Product
    gate_up: Product
    down: Product

    @classmethod
    def of(cls, weights: LayerWeights) -> "ChainLayer":
        return cls(
            weights,
            Product.of(weights.qkv, 64, 8),
            Product.of(weights.output, 64, 4),
            Product.of(weights.gate_up, 64, 8),
            Product.of(weights.down, 256, 4),
        )


class GpuLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers` whose metadata is `GpuMetadata`."""

    def __init__(
        self,
        layers: list[DecoderLayer],
        chain: list[ChainLayer],
        fused: FusedLayers | None,
        attention: GpuAttention,
        parallel: ParallelLayers | None,
    ) -> None:
        """parallel: for the other steps of one of several ranks."""
        self.layers = layers
        self.chain = chain
        self.fused = fused
        self.attention = attention
        self.parallel = parallel

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        metadata: GpuMetadata = context.metadata
        if metadata.chain_tiles is not None:
            return self._run_chain(update, context)
        if self.parallel is not None:
            return self.parallel(update, residual, context)
        if self.fused is not None and (
            self.attention.fixed_order or (metadata.chunks is None and len(update) <= self.fused.most_rows)
        ):
            return self.fused(update, context)
        for layer in self.layers:
            update = layer(update, residual, context)
        return update

    def _run_chain(self, stream: Tensor, context: ForwardContext) -> Tensor:
        """stream: [R, H], the embedding; becomes the sum of all layers, to which nothing is left to be added."""
        first, pdl = self.chain[0], self.attention.pdl
        qkv = stream.new_empty((len(stream), first.qkv.matrix.shape[0]))
        inner = stream.new_empty((len(stream), first.down.matrix.shape[1]))
        mark = context.timer.mark
        for number, cut in enumerate(self.chain):
            layer = cut.weights
            mark("qkv")
            _multiply(stream, cut.qkv, qkv, pdl=pdl, norm=layer.attention_norm)
            mark("attention")
            attended = self.attention.forward(
                number, qkv, layer.query_norm, layer.key_norm, context.angles, context.metadata
            )
            mark("o")
            self._add_product(attended, cut.output, stream)
            mark("gate_up")
            _multiply(stream, cut.gate_up, inner, pdl=pdl, norm=layer.feed_forward_norm, silu=True)
            mark("down")
            self._add_product(inner, cut.down, stream)
        return stream

    def _add_product(self, x: Tensor, product: Product, stream: Tensor) -> None:
        """stream += x times the matrix, of which each rank has a part."""
        pdl = self.attention.pdl
        if self.parallel is None:
            _multiply(x, product, stream, pdl=pdl, addend=stream)
            return
        part, outbox = torch.empty_like(stream), self.parallel.peers.outbox
        if outbox is not None and (product.block % 2 or not outbox.takes(part.numel(), part.dtype)):
            outbox = None
        _multiply(x, product, part, pdl=pdl, outbox=outbox)
        self.parallel.peers.all_reduce_add(part, stream, sent=outbox is not None)


def plan_layers(model: Qwen3, attention: GpuAttention) -> None:
    """Give `model`, whose weights are loaded, its ways to decode, if there are any for it: dense, with sums over ranks
    of which its kernels can do without NCCL; for more than a few rows, on one rank alone."""
    plan_experts(model, pdl=attention.pdl)
    plan_grouped(model, attention)
    group, parallel = model.parallel.tp, None
    head = model.head.weight
    has_rows = _plain(head) is not None or not (model.config.tie_word_embeddings and head.matrix.keeps_rows)
    if group.size == 1 and model.rotary.table is not None and has_rows:
        model.begin = GpuBegin(model.embedding.weight.tensor, model.rotary.table, pdl=attention.pdl)
    if group.size > 1:
        if not isinstance(group.peers, FusedSums) or not group.peers.takes(
            torch.empty((1, model.config.hidden_size), dtype=model.dtype, device=model.device)
        ):
            return
        products = RankProducts(model.operations, model.device, pdl=attention.pdl)
        parallel = ParallelLayers(model.layers, group, group.peers, model.operations, products)
        narrow = products.sends_by_clusters(model.layers[0].attention.output.weight)
        attention.paths = AttentionPaths(narrow=narrow)
        model.all_layers = parallel
    layers = [weights for layer in model.layers if (weights := _weights(layer)) is not None]
    if len(layers) == len(model.layers):
        tiles = plan_tiles(layers[0], fixed_order=attention.fixed_order) if parallel is None else []
        fused = FusedLayers(layers, tiles, attention) if tiles else None
        chain = [ChainLayer.of(layer) for layer in layers]
        model.all_layers = GpuLayers(model.layers, chain, fused, attention, parallel)
        few = fused is not None or (parallel is not None and model.config.hidden_size >= WIDE)
        if not attention.fixed_order:
            attention.paths = replace(attention.paths, chain_rows=FEW_CHAIN_ROWS if few else CHAIN_ROWS)
    has_kernels = isinstance(model.all_layers, GpuLayers | GroupedLayers)
    if has_kernels and (matrix := _plain(head)) is not None and not attention.fixed_order:
        head.replace(FewRowsMatrix(matrix, pdl=attention.pdl))


class GpuBegin:
    """A `vibe_sgl_lite.qwen3.model.Begin` in one kernel, for one rank."""

    def __init__(self, matrix: Tensor, table: Tensor, *, pdl: bool) -> None:
        """matrix: the embedding. table: of the angles, see `RotaryEmbedding`."""
        self._matrix, self._table, self._pdl = matrix, table, pdl

    def __call__(self, token_ids: Tensor, positions: Tensor, timer: PartTimer) -> tuple[Tensor, Tensor, RopeAngles]:
        timer.mark("embedding")
        update = self._matrix.new_empty((len(token_ids), self._matrix.shape[1]))
        residual, angles = torch.empty_like(update), self._table.new_empty((len(token_ids), *self._table.shape[1:]))
        begin(token_ids, positions, self._matrix, self._table, update, residual, angles, pdl=self._pdl)
        timer.mark(OTHER)
        return update, residual, RopeAngles(angles[:, 0], angles[:, 1])


class FewRowsMatrix(PlainMatrix):
    """A plain one, whose products with a few rows let the matrix be read before the kernel before them has ended."""

    def __init__(self, matrix: Tensor, *, pdl: bool) -> None:
        super().__init__(matrix)
        self._product, self._pdl = Product.of(matrix, 128, 8), pdl

    def multiply(self, x: Tensor) -> Tensor:
        if len(x) > FEW_CHAIN_ROWS:
            return super().multiply(x)
        output = x.new_empty((len(x), len(self.tensor)))
        _multiply(x, self._product, output, pdl=self._pdl)
        return output


def _weights(layer: DecoderLayer) -> LayerWeights | None:
    attention, feed_forward = layer.attention, layer.feed_forward
    if not isinstance(feed_forward, MLP):
        return None
    holders = (attention.qkv.weight, attention.output.weight, feed_forward.gate_up.weight, feed_forward.down.weight)
    qkv, output, gate_up, down = (_plain(holder) for holder in holders)
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    norms = layer.attention_norm, attention.query_norm, attention.key_norm, layer.feed_forward_norm
    return LayerWeights(qkv, output, gate_up, down, *norms)


def _plain(holder: MatrixWeight) -> Tensor | None:
    return holder.matrix.tensor if isinstance(holder.matrix, PlainMatrix) else None


def _multiply(
    x: Tensor,
    product: Product,
    output: Tensor,
    *,
    pdl: bool,
    norm: RMSNorm | None = None,
    addend: Tensor | None = None,
    silu: bool = False,
    outbox: Outbox | None = None,
) -> None:
    gemv(
        x,
        product.matrix,
        output,
        pdl=pdl,
        block=product.block,
        warps=product.warps,
        gain=None if norm is None else norm.weight.tensor,
        eps=0.0 if norm is None else norm.eps,
        addend=addend,
        silu=silu,
        outbox=outbox,
    )
