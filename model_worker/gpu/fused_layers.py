"""Decode steps of some to some hundred rows: five kernels a layer.

The product of queries, keys and values; attention with all that comes before it; its output, added to the residual
stream; gate and up with SiLU; and down, added again. The norms are in the products (kernels/product.py).
"""

from dataclasses import dataclass, fields, replace

import torch
import triton
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.attention_backend import GpuAttention
from vibe_sgl_lite.model_worker.gpu.driver import has_clusters
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles
from vibe_sgl_lite.model_worker.gpu.kernels.product import (
    AnyTiles,
    ProductScratch,
    ProductTiles,
    added_product,
    begin_stream,
    normed_product,
)
from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm


@dataclass(frozen=True)
class LayerWeights:
    """Matrices: qkv [(Hq + 2 Hk) D, H], output [H, Hq D], gate_up [2 I, H], down [H, I]."""

    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: RMSNorm
    query_norm: RMSNorm
    key_norm: RMSNorm
    feed_forward_norm: RMSNorm


@dataclass(frozen=True)
class LayerTiles:
    """How a layer's four products are cut."""

    qkv: AnyTiles
    output: AnyTiles
    gate_up: AnyTiles
    down: AnyTiles


# By the most rows that they are for; measured on an H100 at the 0.6B shape (benchmarks/internal/gpu_products.py).
TILES = (
    (
        16,
        LayerTiles(
            ProductTiles(16, 64, 128, 1, 4, 6, matrix_first=True),
            ProductTiles(16, 64, 128, 4, 4, 6, matrix_first=True),
            ProductTiles(64, 32, 128, 1, 4, 4),
            ProductTiles(16, 64, 128, 4, 4, 6, matrix_first=True),
        ),
    ),
    (
        32,
        LayerTiles(
            ProductTiles(64, 32, 128, 1, 4, 6),
            ProductTiles(64, 32, 128, 4, 4, 6),
            ProductTiles(64, 32, 128, 1, 4, 4),
            ProductTiles(64, 32, 128, 4, 4, 6),
        ),
    ),
    (
        64,
        LayerTiles(
            ProductTiles(64, 32, 128, 1, 4, 6),
            ProductTiles(64, 32, 128, 2, 4, 6),
            ProductTiles(64, 32, 128, 1, 4, 4),
            ProductTiles(64, 32, 128, 4, 4, 6),
        ),
    ),
    (
        128,
        LayerTiles(
            ProductTiles(64, 64, 128, 1, 4, 4),
            ProductTiles(64, 32, 128, 2, 4, 6),
            ProductTiles(64, 64, 128, 1, 4, 4),
            ProductTiles(64, 32, 128, 2, 4, 6),
        ),
    ),
    (
        256,
        LayerTiles(
            ProductTiles(64, 128, 64, 1, 4, 6),
            ProductTiles(64, 32, 128, 1, 4, 6),
            ProductTiles(64, 128, 64, 1, 8, 4),
            ProductTiles(64, 64, 128, 2, 4, 4),
        ),
    ),
)
# What goes in their place in 16 bits on a Hopper card; measured there with benchmarks/internal/gpu_layers.py.
CLUSTERS: dict[int, dict[str, ClusterTiles]] = {
    16: {
        "qkv": ClusterTiles(16, 64, 1, 16),
        "output": ClusterTiles(16, 64, 4, 8),
        "gate_up": ClusterTiles(16, 32, 1, 16),
        "down": ClusterTiles(16, 64, 4, 12),
    },
    32: {
        "qkv": ClusterTiles(16, 64, 1, 16),
        "output": ClusterTiles(16, 64, 4, 8),
        "gate_up": ClusterTiles(32, 32, 1, 16),
        "down": ClusterTiles(32, 64, 4, 12),
    },
    64: {
        "output": ClusterTiles(32, 128, 4, 8),
        "gate_up": ClusterTiles(64, 32, 1, 13),
        "down": ClusterTiles(32, 128, 4, 10),
    },
    128: {
        "output": ClusterTiles(64, 128, 4, 8),
        "gate_up": ClusterTiles(128, 32, 1, 8),
        "down": ClusterTiles(128, 64, 4, 8),
    },
    256: {
        "output": ClusterTiles(128, 64, 2, 8),
        "gate_up": ClusterTiles(128, 64, 1, 6),
        "down": ClusterTiles(128, 128, 4, 6),
    },
}
WIDE = 4096  # hidden size from which cuBLAS's products win with more rows than those of the first tiles
ANY_ROWS = 1 << 30
# For any number of rows, so that no row's sums depend on how many there are: one split, in each.
FIXED_WIDE, FIXED_NARROW = ProductTiles(64, 64, 128, 1, 4, 4), ProductTiles(64, 32, 128, 1, 4, 6)
FIXED_TILES = LayerTiles(FIXED_WIDE, FIXED_NARROW, FIXED_WIDE, FIXED_NARROW)


def adapt(tiles: ProductTiles, outputs: int, inputs: int, dtype: torch.dtype) -> ProductTiles | None:
    """`tiles`, made smaller as a matrix of that shape wants it; None where none fit. fp32 has one cut for all: its
    products take long to compile, and are there to be right."""
    if dtype == torch.float32:
        tiles = ProductTiles(32, 32, 32, 1, 4, 2)
    if not tiles.fits(outputs, inputs):
        tiles = replace(tiles, splits=1)
    while not tiles.fits(outputs, inputs) and min(tiles.inputs, tiles.outputs) > 16:
        tiles = replace(tiles, inputs=max(16, tiles.inputs // 2), outputs=max(16, tiles.outputs // 2))
    return tiles if tiles.fits(outputs, inputs) else None


def plan_tiles(
    layer: LayerWeights, *, fixed_order: bool = False, clusters: bool | None = None
) -> list[tuple[int, LayerTiles]]:
    """`TILES`, or `FIXED_TILES`, for this layer's matrices; empty where there are none. clusters: with `CLUSTERS`;
    None: where the device has them."""
    dtype, hidden = layer.qkv.dtype, layer.down.shape[0]
    if clusters is None:
        clusters = has_clusters(layer.qkv.device)
    clusters = clusters and not fixed_order and hidden < WIDE and dtype != torch.float32
    planned = []
    some = TILES if hidden < WIDE else TILES[:1]
    for most, tiles in ((ANY_ROWS, FIXED_TILES),) if fixed_order else some:
        cuts = {}
        for field in fields(LayerTiles):
            outputs, inputs = getattr(layer, field.name).shape
            outputs //= 2 if field.name == "gate_up" else 1
            cut: AnyTiles | None = CLUSTERS[most].get(field.name) if clusters else None
            if cut is None or not cut.fits(outputs, inputs):
                cut = adapt(getattr(tiles, field.name), outputs, inputs, dtype)
            added = field.name in ("output", "down")
            if cut is None or (added and hidden // cut.outputs != triton.next_power_of_2(hidden // cut.outputs)):
                return []
            cuts[field.name] = cut
        planned.append((most, LayerTiles(**cuts)))
    return planned


class FusedLayers:
    """All of a model's layers, for steps that decode, or with one cut for all of them; dense, on one rank."""

    def __init__(
        self, layers: list[LayerWeights], tiles: list[tuple[int, LayerTiles]], attention: GpuAttention
    ) -> None:
        """tiles: of `plan_tiles`."""
        self.layers = layers
        self.tiles = tiles
        self.most_rows = tiles[-1][0]
        self.attention = attention
        sums, count, first = 1, 1, layers[0]
        for most, cuts in tiles:
            for cut, matrix in ((cuts.qkv, first.qkv), (cuts.output, first.output), (cuts.down, first.down)):
                if cut.splits == 1 or isinstance(cut, ClusterTiles):
                    continue
                sums = max(sums, most * len(matrix) * cut.splits)
                count = max(count, -(-most // cut.rows) * (len(matrix) // cut.outputs))
        self.scratch = ProductScratch(layers[0].qkv.device, sums, count)

    def __call__(self, stream: Tensor, context: ForwardContext) -> Tensor:
        """stream: [R, H], the embedding; becomes the sum of all layers, to which nothing is left to be added."""
        rows, hidden = stream.shape
        cuts = next(cuts for most, cuts in self.tiles if rows <= most)
        first, pdl, scratch = self.layers[0], self.attention.pdl, self.scratch
        qkv = stream.new_empty((rows, len(first.qkv)))
        inner = stream.new_empty((rows, first.down.shape[1]))
        gained = torch.empty_like(stream)
        after_attention, after_layer = (
            stream.new_empty((rows, hidden // cut.outputs), dtype=torch.float32) for cut in (cuts.output, cuts.down)
        )
        begin_stream(stream, first.attention_norm.weight.tensor, gained, after_layer, pdl=pdl)
        mark = context.timer.mark
        for number, layer in enumerate(self.layers):
            mark("qkv")
            normed_product(
                gained, after_layer, layer.attention_norm.eps, layer.qkv, qkv, cuts.qkv, scratch, pdl=pdl
            )  # fmt: skip
            mark("attention")
            attended = self.attention.forward(
                number, qkv, layer.query_norm, layer.key_norm, context.angles, context.metadata
            )
            mark("o")
            norm = layer.feed_forward_norm
            added_product(
                attended, layer.output, stream, norm.weight.tensor, gained, after_attention, cuts.output, scratch,
                pdl=pdl,
            )  # fmt: skip
            mark("gate_up")
            normed_product(
                gained, after_attention, norm.eps, layer.gate_up, inner, cuts.gate_up, scratch, pdl=pdl, silu=True
            )
            mark("down")
            following = self.layers[min(number + 1, len(self.layers) - 1)].attention_norm  # of the last not used
            added_product(
                inner, layer.down, stream, following.weight.tensor, gained, after_layer, cuts.down, scratch, pdl=pdl
            )  # fmt: skip
        return stream
