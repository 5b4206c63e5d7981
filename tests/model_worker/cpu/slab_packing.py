"""int8 and int4 matrices, quantised and laid out in plain torch: what the kernels' own packing must equal.

O outputs, I inputs, S slabs of 64 outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.linear import GROUP, SLAB, SlabWeights, WeightFormat

LEVELS, MIDDLE = 16, 8  # of int4: code c stands for (c - 8) x scale + offset


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8: [O, I] -> codes [O, I] int8 and scales [O] fp32; `matrix` is about codes x scales."""
    values = matrix.to(torch.float32)
    scales = values.abs().amax(1).clamp_min_(1e-30) / 127
    return (values / scales.unsqueeze(1)).round_().to(torch.int8), scales


def quantize_groups(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int4: [O, I] -> codes [O, I] int32 of 0 to 15, scales and offsets [O, I / 32] in bf16.

    Begins with the range of each group, then alternates least squares, of scale and offset for the codes, and rounding
    to the nearest code: Lloyd's algorithm with equally spaced levels.
    """
    values = matrix.to(torch.float32).view(matrix.shape[0], -1, GROUP)
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    scales = (high - low) / (LEVELS - 1)
    codes = _nearest(values, scales, low + MIDDLE * scales)
    mean_code, mean = codes.mean(2, keepdim=True), values.mean(2, keepdim=True)
    spread = codes - mean_code
    variance = spread.square().sum(2, keepdim=True)
    scales = torch.where(variance > 0, (spread * values).sum(2, keepdim=True) / variance, scales)
    scales, offsets = scales.bfloat16(), (mean - mean_code * scales).bfloat16()
    codes = _nearest(values, scales.float(), offsets.float()) + MIDDLE
    return codes.view(matrix.shape).to(torch.int32), scales.squeeze(2), offsets.squeeze(2)


def _nearest(values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Codes less MIDDLE; 0 where all values of a group are the same, which the offset alone then gives."""
    codes = (values - offsets) / torch.where(scales > 0, scales, torch.ones_like(scales))
    return codes.round_().clamp_(-MIDDLE, LEVELS - 1 - MIDDLE)


def pack_int8(matrix: Tensor) -> SlabWeights:
    """matrix: [O, I]."""
    codes, scales = quantize_rows(matrix)
    outputs, inputs = codes.shape
    unsigned = (_pad(codes) ^ -128).view(torch.int32)  # flipping the highest bit adds 128
    data = unsigned.view(-1, SLAB, inputs // 4).transpose(1, 2).contiguous()
    padded = F.pad(scales, (0, data.shape[0] * SLAB - outputs))
    return SlabWeights(WeightFormat.INT8, outputs, inputs, data, padded)


def pack_int4(matrix: Tensor) -> SlabWeights:
    """matrix: [O, I] bf16."""
    codes, scales, offsets = quantize_groups(matrix)
    outputs, inputs = codes.shape
    groups = inputs // GROUP
    # A unit's bytes: inputs 0 and 2, 4 and 6, then, of its upper half, 1 and 3, 5 and 7; the first in the lower nibble.
    eight = _pad(codes.to(torch.uint8)).view(-1, inputs // 8, 8)
    nibbles = eight[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    units = (nibbles[..., :4] | nibbles[..., 4:] << 4).view(torch.int32)
    slabs = units.shape[0] // SLAB
    data = torch.zeros((slabs, groups, GROUP // 8 + 1, SLAB), dtype=torch.int32)
    data[:, :, : GROUP // 8] = units.view(slabs, SLAB, groups, GROUP // 8).permute(0, 2, 3, 1)
    ends = data[:, :, GROUP // 8].view(torch.bfloat16).view(slabs, groups, 2, SLAB)
    ends[:, :, 0] = _pad(scales).view(slabs, SLAB, groups).transpose(1, 2)
    ends[:, :, 1] = _pad(offsets).view(slabs, SLAB, groups).transpose(1, 2)
    return SlabWeights(WeightFormat.INT4, outputs, inputs, data)


def _pad(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % SLAB))
