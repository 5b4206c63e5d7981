"""Matrices in the layout that the linear kernels read; native/linear.h draws it.

Packing is plain torch: a matrix is packed once, when it is loaded. O outputs, I inputs, S slabs of 64 outputs.
"""

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from model_worker.cpu_kernels.huge_memory import HugeMemory

SLAB = 64  # outputs that lie side by side
GROUP = 32  # inputs that share a scale and an offset in int4
INPUT_MULTIPLE = 32


class WeightFormat(IntEnum):
    """As native/linear.h numbers them."""

    BF16 = 0
    INT8 = 1
    INT4 = 2


class SlabWeights:
    """One [O, I] matrix, I a multiple of INPUT_MULTIPLE. Made by the functions below."""

    def __init__(
        self, weight_format: WeightFormat, outputs: int, inputs: int, data: Tensor, scales: Tensor | None = None
    ) -> None:
        assert inputs % INPUT_MULTIPLE == 0
        self.format = weight_format
        self.outputs, self.inputs = outputs, inputs
        self.data, self.scales = data, scales
        self.nbytes = data.nbytes + (0 if scales is None else scales.nbytes)
        self.arguments = (
            int(weight_format),
            data.data_ptr(),
            None if scales is None else scales.data_ptr(),
            inputs,
            outputs,
        )


def pack_bf16(matrix: Tensor, memory: HugeMemory) -> SlabWeights:
    """matrix: [O, I] bf16."""
    outputs, inputs = matrix.shape
    units = _pad(matrix).view(torch.int32)  # [O', I / 2]
    data = _slabs(units, memory)
    return SlabWeights(WeightFormat.BF16, outputs, inputs, data)


def pack_int8(codes: Tensor, scales: Tensor, memory: HugeMemory) -> SlabWeights:
    """codes: [O, I] int8, -127 to 127; scales: [O] fp32."""
    outputs, inputs = codes.shape
    unsigned = (_pad(codes) ^ -128).view(torch.int32)  # flipping the highest bit adds 128
    data = _slabs(unsigned, memory)
    padded = F.pad(scales, (0, data.shape[0] * SLAB - outputs))
    return SlabWeights(WeightFormat.INT8, outputs, inputs, data, padded)


def empty_int4(outputs: int, inputs: int, memory: HugeMemory) -> SlabWeights:
    """A matrix for `fill_int4`."""
    data = memory.empty((-(-outputs // SLAB), inputs // GROUP, GROUP // 8 + 1, SLAB), torch.int32)
    return SlabWeights(WeightFormat.INT4, outputs, inputs, data)


def fill_int4(weights: SlabWeights, first: int, codes: Tensor, scales: Tensor, offsets: Tensor) -> None:
    """Rows first .. first + n of the matrix, `first` a multiple of SLAB, n too but at the end.

    codes: [n, I] int32, 0 to 15; scales, offsets: [n, I / GROUP] bf16. Code c means (c - 8) x scale + offset.
    """
    assert first % SLAB == 0
    groups = weights.inputs // GROUP
    # A unit's bytes: inputs 0 and 2, 4 and 6, then, of its upper half, 1 and 3, 5 and 7; the first in the lower nibble.
    eight = _pad(codes.to(torch.uint8)).view(-1, weights.inputs // 8, 8)
    nibbles = eight[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    units = (nibbles[..., :4] | nibbles[..., 4:] << 4).view(torch.int32)
    slabs = units.shape[0] // SLAB
    data = weights.data[first // SLAB :][:slabs]
    data[:, :, : GROUP // 8] = units.view(slabs, SLAB, groups, GROUP // 8).permute(0, 2, 3, 1)
    ends = data[:, :, GROUP // 8].view(torch.bfloat16).view(slabs, groups, 2, SLAB)
    ends[:, :, 0] = _pad(scales).view(slabs, SLAB, groups).transpose(1, 2)
    ends[:, :, 1] = _pad(offsets).view(slabs, SLAB, groups).transpose(1, 2)


def _pad(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % SLAB
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _slabs(units: Tensor, memory: HugeMemory) -> Tensor:
    """[S x 64, units] -> [S, units, 64], in memory of its own."""
    slabs, width = units.shape[0] // SLAB, units.shape[1]
    data = memory.empty((slabs, width, SLAB), torch.int32)
    data.copy_(units.view(slabs, SLAB, width).transpose(1, 2))
    return data
