"""W8A8: weights in int8 with a scale an output, activations in 8 bits with a scale a row, found as they come.

Sums are exact integers, so a row's result has the same bits whatever the other rows are.
"""

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.weight import ProductOnly

LEVELS = 127  # of weights, on either side of zero
# Instructions before VNNI add pairs of products in 16 bits, which saturate, unless activations have a bit less.
ACTIVATION_LEVELS = (127, 63)
CHUNK = 256  # rows of weights quantised at a time, so that what is in between stays in the cache
SMALLEST = 1e-30  # of a row's largest value: rows of zeros have a scale too


class Int8Matrix(ProductOnly):
    """[out, in], packed by oneDNN.

    activation_levels: of a row of activations, on either side of zero. They are shifted into uint8: oneDNN multiplies
    int8 by int8 fast only with AMX, and with AVX512-VNNI or AVX-VNNI in a plain loop, hundreds of times slower; for
    uint8 by int8 it has fast kernels everywhere.
    """

    def __init__(self, matrix: Tensor, activation_levels: int = ACTIVATION_LEVELS[0]) -> None:
        self._levels = activation_levels
        self._scales = torch.empty(matrix.shape[0])
        codes = torch.empty(matrix.shape, dtype=torch.int8)
        for start in range(0, matrix.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            codes[rows], self._scales[rows] = quantize_rows(matrix[rows])
        self._zeros = torch.zeros(matrix.shape[0], dtype=torch.int32)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        self.nbytes = codes.nbytes + self._scales.nbytes + self._zeros.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in x's dtype. A row that is not finite gives one that is not."""
        # A tenth of the time of torch's infinity norm, which is not vectorised along rows.
        largest = x.abs().amax(1, keepdim=True).to(torch.float32).clamp_min(SMALLEST)
        shift = self._levels + 1
        # The cast truncates, and all values are positive: a half more rounds them.
        shifted = (x * (self._levels / largest)).add_(shift + 0.5).to(torch.uint8)
        sums = torch.ops.onednn.qlinear_pointwise.default(
            shifted, 1.0, shift, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.mul(sums, largest / self._levels, out=x.new_empty(sums.shape))


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] int8 and scales [out] fp32; `matrix` is about codes x scales."""
    values = matrix.to(torch.float32)
    scales = values.abs().amax(1).clamp_min_(SMALLEST) / LEVELS
    return (values / scales.unsqueeze(1)).round_().to(torch.int8), scales


def choose_activation_levels() -> int | None:
    """The most levels with which this machine's kernels give the largest sums exactly; None without such kernels."""
    if not torch._C._has_mkldnn:
        return None
    size = 64
    x = torch.tensor([[1.0], [-1.0]]).expand(2, size)
    for levels in ACTIVATION_LEVELS:
        product = Int8Matrix(torch.ones(size, size), levels).multiply(x)
        if bool(((product - x * size).abs() < 1e-3).all()):
            return levels
    return None
