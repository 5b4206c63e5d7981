"""Weight-only int4: groups of inputs share a scale and an offset; activations and products keep the model's dtype."""

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.weight import ProductOnly

GROUP_SIZE = 32
OUTPUT_MULTIPLE = 16  # torch's kernel takes outputs in multiples of it
LEVELS = 16
MIDDLE = 8  # the kernel's value of code c is (c - 8) x scale + offset
REFITS = 1
CHUNK = 256  # rows quantised at a time, so that what is in between stays in the cache; the kernel packs 64 together


class Int4Matrix(ProductOnly):
    """[out, in], in % GROUP_SIZE == 0 and out % OUTPUT_MULTIPLE == 0, in the layout of torch's own kernel."""

    def __init__(self, matrix: Tensor) -> None:
        out_features, in_features = matrix.shape
        self._packed = torch.empty((out_features, in_features // 2), dtype=torch.uint8)
        self._scales = torch.empty((in_features // GROUP_SIZE, out_features, 2), dtype=matrix.dtype)
        for start in range(0, out_features, CHUNK):
            rows = slice(start, start + CHUNK)
            codes, scales, offsets = quantize_groups(matrix[rows])
            self._packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self._scales[:, rows, 0] = scales.T
            self._scales[:, rows, 1] = offsets.T
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in x's dtype."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, GROUP_SIZE, self._scales)
        return product


def quantize_groups(matrix: Tensor, group: int = GROUP_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> codes [out, in] int32 of 0 to 15, scales and offsets [out, in / group] in `matrix`'s dtype.

    Begins with the range of each group, then alternates least squares, of scale and offset for the codes, and rounding
    to the nearest code: Lloyd's algorithm with equally spaced levels.
    """
    out_features, in_features = matrix.shape
    values = matrix.to(torch.float32).view(out_features, in_features // group, group)
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    scales = (high - low) / (LEVELS - 1)
    offsets = low + MIDDLE * scales
    for _ in range(REFITS):
        codes = _nearest(values, scales, offsets)
        mean_code, mean = codes.mean(2, keepdim=True), values.mean(2, keepdim=True)
        spread = codes - mean_code
        variance = spread.square().sum(2, keepdim=True)
        fitted = spread.mul_(values).sum(2, keepdim=True) / variance
        scales = torch.where(variance > 0, fitted, scales)
        offsets = mean - mean_code * scales
    scales, offsets = scales.to(matrix.dtype), offsets.to(matrix.dtype)
    codes = _nearest(values, scales.float(), offsets.float()) + MIDDLE
    return codes.view(out_features, in_features).to(torch.int32), scales.squeeze(2), offsets.squeeze(2)


def _nearest(values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Codes less MIDDLE; 0 where all values of a group are the same, which the offset alone then gives."""
    codes = (values - offsets).div_(torch.where(scales > 0, scales, torch.ones_like(scales)))
    return codes.round_().clamp_(-MIDDLE, LEVELS - 1 - MIDDLE)
