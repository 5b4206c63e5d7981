"""How the products of one of several ranks are cut, for as many rows as that beats cuBLAS: by clusters of blocks where
the card has them and a cut was measured (kernels/cluster_product.py), else by Triton's (kernels/rank_product.py)."""

from dataclasses import replace

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.driver import has_clusters
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles, cluster_product
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import ProductCut, rank_product
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight

PLACES = 132  # multiprocessors of an H100
MOST_ROWS, MOST_SILU_ROWS = 64, 128
LONG_INPUTS = 8192


def choose_cut(rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, silu: bool) -> ProductCut | None:
    """For a matrix [outputs, inputs], or twice that with silu; None where torch's product is as good, or none fits.

    Measured on an H100 (benchmarks/internal/rank_products.py).
    """
    if dtype == torch.float32:  # to be right
        cut, places = ProductCut(32, 32, 32, 1, 4, 2), 1
    elif rows <= 16:
        cut, places = ProductCut(16, 64, 128, 1, 4, 5 if silu else 6, matrix_first=True, early=4), PLACES
    elif rows <= 32:
        cut, places = ProductCut(32, 64, 128, 1, 4, 4 if silu else 5, matrix_first=True, early=4), PLACES
    elif rows <= MOST_ROWS and silu:
        cut, places = _one_turn(outputs), PLACES
    elif rows <= MOST_ROWS and inputs < LONG_INPUTS:
        cut, places = ProductCut(64, 64, 128, 1, 4, 6, matrix_first=True, early=4), PLACES
    elif rows <= MOST_ROWS:
        cut, places = ProductCut(64, 64, 128, 1, 4, 3, early=12), 2 * PLACES
    else:
        cut, places = ProductCut(128, 64, 64, 1, 8, 6, early=4), PLACES
    if rows > (MOST_SILU_ROWS if silu else MOST_ROWS) or outputs % cut.width or inputs % cut.inputs:
        return None
    splits = 1 if silu else max(1, min(places // (outputs // cut.width), inputs // cut.inputs // 2))
    return replace(cut, splits=splits)


def _one_turn(outputs: int) -> ProductCut:
    """Of gate and up of 33 to 64 rows: blocks of up to 128 outputs, all at once, where those of 64 would not be."""
    if outputs > 64 * PLACES:
        span = next(outputs // count for count in range(PLACES, 0, -1) if outputs % count == 0)
        if span <= 128:
            return ProductCut(64, 128, 64, 1, 8, 5, early=4, span=span)
    return ProductCut(64, 64, 128, 1, 8, 4, early=4)


def choose_clusters(rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, silu: bool) -> ClusterTiles | None:
    """For a card that has them; None where none was measured. Blocks are 128, all at once, in clusters of two at most.

    Measured on two H200 with 16 and 64 rows of the 32B shape (docs/parallelism.md).
    """
    if dtype != torch.bfloat16 or rows > MOST_ROWS:
        return None
    if silu:
        cut = ClusterTiles(MOST_ROWS, 128, 1, 6, span=outputs // 128)
    else:  # attention's output has fewer stages, so that there is room beside attention for its first boxes
        cut = ClusterTiles(MOST_ROWS, 128, 2, 8 if outputs > inputs else 12, span=outputs // 64)
    return cut if 64 < cut.span <= 128 and cut.span % 4 == 0 and cut.fits(outputs, inputs) else None


class RankProducts:
    """Products with the matrices of one of several ranks: by our kernels where they are faster."""

    def __init__(self, operations: LayerOperations, device: torch.device, *, pdl: bool) -> None:
        self.operations = operations
        self.pdl = pdl
        self.has_clusters = pdl and has_clusters(device)
        self._scratch = ProductScratch(device, 2 * PLACES * MOST_ROWS * 128, 2 * PLACES)

    def sends_by_clusters(self, weight: MatrixWeight) -> bool:
        """Whether the product of 64 rows with it, or fewer, is by clusters of blocks."""
        outputs, inputs = weight.shape
        cut = choose_clusters(MOST_ROWS, outputs, inputs, weight.dtype, silu=False)
        return self.has_clusters and type(weight.matrix) is PlainMatrix and cut is not None

    def multiply(self, x: Tensor, weight: MatrixWeight) -> Tensor:
        """[R, K] -> [R, N]."""
        product = self._ours(x, weight)
        return weight.multiply(x) if product is None else product

    def multiply_silu(self, x: Tensor, weight: MatrixWeight) -> Tensor:
        """[R, K] -> [R, N], of 2 x N outputs: silu(the first N) times the others."""
        product = self._ours(x, weight, silu=True)
        return self.operations.silu_multiply(weight.multiply(x)) if product is None else product

    def multiply_and_send(self, x: Tensor, weight: MatrixWeight, outbox: Outbox | None) -> tuple[Tensor, bool]:
        """As `multiply`, and whether it is sent: then the next sum is of this."""
        rows, outputs = len(x), weight.shape[0]
        if outbox is not None and not outbox.takes(rows * outputs, x.dtype):
            outbox = None
        product = self._ours(x, weight, outbox=outbox)
        return (weight.multiply(x), False) if product is None else (product, outbox is not None)

    def _ours(
        self, x: Tensor, weight: MatrixWeight, *, silu: bool = False, outbox: Outbox | None = None
    ) -> Tensor | None:
        if type(weight.matrix) is not PlainMatrix or len(x) == 0:
            return None
        outputs = weight.shape[0] // (2 if silu else 1)
        clusters = choose_clusters(len(x), outputs, x.shape[1], x.dtype, silu=silu) if self.has_clusters else None
        if clusters is not None:
            output = x.new_empty((len(x), outputs))
            cluster_product(x, weight.tensor, output, clusters, pdl=True, silu=silu, outbox=outbox)
            return output
        cut = choose_cut(len(x), outputs, x.shape[1], x.dtype, silu=silu)
        if cut is None:
            return None
        output = x.new_empty((len(x), outputs))
        rank_product(x, weight.tensor, output, cut, self._scratch, pdl=self.pdl, silu=silu, outbox=outbox)
        return output
