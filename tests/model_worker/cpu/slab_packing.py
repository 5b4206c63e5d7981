"""The layout of int8 and int4 matrices, written out in torch: what the kernels' own packing must equal.

O outputs, I inputs, S slabs of 64 outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.linear import GROUP, SLAB, SlabWeights, WeightFormat
from vibe_sgl_lite.qwen3.layers.quantization_int4 import quantize_groups
from vibe_sgl_lite.qwen3.layers.quantization_int8 import quantize_rows


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
