"""Makes the matrices that the linear kernels read of plain ones, when they are loaded.

Quantisation is that of qwen3/layers/quantization_int8.py and quantization_int4.py, on all threads, straight into its
place.
O outputs, I inputs, a multiple of INPUT_MULTIPLE.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.api import DTYPES, CpuKernels
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import GROUP, SLAB, SlabWeights, WeightFormat


def pack_bf16(matrix: Tensor, memory: HugeMemory) -> SlabWeights:
    """matrix: [O, I] bf16."""
    outputs, inputs = matrix.shape
    slabs = _slabs(outputs)
    data = memory.empty((slabs, inputs // 2, SLAB), torch.int32)
    missing = slabs * SLAB - outputs
    padded = F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
    data.copy_(padded.view(torch.int32).view(slabs, SLAB, inputs // 2).transpose(1, 2))
    return SlabWeights(WeightFormat.BF16, outputs, inputs, data)


def pack_int8(kernels: CpuKernels, matrix: Tensor, memory: HugeMemory) -> SlabWeights:
    """matrix: [O, I] bf16 or fp32, contiguous."""
    outputs, inputs = matrix.shape
    data = memory.empty((_slabs(outputs), inputs // 4, SLAB), torch.int32)
    scales = torch.zeros(data.shape[0] * SLAB)
    assert matrix.is_contiguous()
    kernels.library.vsl_pack_int8(
        kernels.context, DTYPES[matrix.dtype], matrix.data_ptr(), outputs, inputs, data.data_ptr(), scales.data_ptr()
    )
    return SlabWeights(WeightFormat.INT8, outputs, inputs, data, scales)


def pack_int4(kernels: CpuKernels, matrix: Tensor, memory: HugeMemory) -> SlabWeights:
    """matrix: [O, I] bf16 or fp32, contiguous; it is rounded to bf16 first, which loses far less than the codes do."""
    outputs, inputs = matrix.shape
    data = memory.empty((_slabs(outputs), inputs // GROUP, GROUP // 8 + 1, SLAB), torch.int32)
    assert matrix.is_contiguous()
    kernels.library.vsl_pack_int4(
        kernels.context, DTYPES[matrix.dtype], matrix.data_ptr(), outputs, inputs, data.data_ptr()
    )
    return SlabWeights(WeightFormat.INT4, outputs, inputs, data)


def _slabs(outputs: int) -> int:
    return -(-outputs // SLAB)
