"""Matrices whose products are cut the same for any number of rows, so that a row's bits do not depend on the others."""

from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.fused_layers import FIXED_WIDE, adapt
from vibe_sgl_lite.model_worker.gpu.kernels.product import plain_product
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix

MULTIPLE = 16  # of inputs and outputs: the smallest tile


class FixedMatrix(PlainMatrix):
    """One of them, on a GPU; its sides are multiples of `MULTIPLE`."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        outputs, inputs = matrix.shape
        tiles = adapt(FIXED_WIDE, outputs, inputs, matrix.dtype)
        assert tiles is not None
        self._tiles = tiles
        self._pdl = has_dependent_launch(matrix.device)

    def multiply(self, x: Tensor) -> Tensor:
        output = x.new_empty((len(x), len(self.tensor)))
        plain_product(x.contiguous(), self.tensor, output, self._tiles, pdl=self._pdl)
        return output
