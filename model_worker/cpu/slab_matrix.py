"""Matrices of the model that the linear kernels multiply by, made of plain ones when they are loaded.

Quantisation runs on all threads, straight into its place. O outputs, I inputs, which are filled up with zeros to a
multiple of INPUT_MULTIPLE.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.api import CpuKernels
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import GROUP, INPUT_MULTIPLE, SLAB, SlabWeights, WeightFormat


class SlabMatrix:
    """[O, I] in one of the kernels' formats. In int8, a row that is not finite gives one that is not."""

    def __init__(self, kernels: CpuKernels, weights: SlabWeights, inputs: int) -> None:
        self._kernels, self.weights = kernels, weights
        self._inputs, self.padding = inputs, weights.inputs - inputs
        self.nbytes = weights.nbytes
        # With all its bits, a head's matrix is the embedding's too, if those are tied.
        self.keeps_rows = weights.format in (WeightFormat.BF16, WeightFormat.FP32)

    def multiply(self, x: Tensor) -> Tensor:
        return self._kernels.linear(F.pad(x, (0, self.padding)) if self.padding else x, self.weights)

    def rows(self, ids: Tensor) -> Tensor:
        return self._kernels.gather_rows(self.weights, ids)[:, : self._inputs]

    def refill(self, matrix: Tensor) -> None:
        SlabFormat(self._kernels, self.weights.format).pack(matrix, into=self.weights)


class SlabFormat:
    """A `MatrixFormat` (qwen3/layers/weight.py): makes matrices of one format for `kernels`, all in the same memory."""

    def __init__(self, kernels: CpuKernels, weight_format: WeightFormat) -> None:
        self._kernels, self._format = kernels, weight_format
        self._memory = HugeMemory()

    def __call__(self, matrix: Tensor) -> SlabMatrix:
        return SlabMatrix(self._kernels, self.pack(matrix), matrix.shape[1])

    def pack(self, matrix: Tensor, into: SlabWeights | None = None) -> SlabWeights:
        """matrix: [O, I] bf16 or fp32, as the format has it; int8 and int4 take both. into: a packed one of its shape,
        whose place it takes.

        int4 rounds to bf16 first, which loses far less than its codes do.
        """
        missing = -matrix.shape[1] % INPUT_MULTIPLE
        matrix = F.pad(matrix, (0, missing)) if missing else matrix.contiguous()  # to pad by nothing is to copy
        if self._format in (WeightFormat.BF16, WeightFormat.FP32):
            return self._interleave(matrix, into)
        if into is not None:
            self._kernels.pack(matrix, into)
            return into
        outputs, inputs = matrix.shape
        slabs = -(-outputs // SLAB)
        scales = None
        if self._format is WeightFormat.INT8:
            data = self._memory.empty((slabs, inputs // 4, SLAB), torch.int32)
            scales = torch.zeros(slabs * SLAB)
        else:
            data = self._memory.empty((slabs, inputs // GROUP, GROUP // 8 + 1, SLAB), torch.int32)
        weights = SlabWeights(self._format, outputs, inputs, data, scales)
        self._kernels.pack(matrix, weights)
        return weights

    def _interleave(self, matrix: Tensor, into: SlabWeights | None) -> SlabWeights:
        outputs, inputs = matrix.shape
        missing = -outputs % SLAB
        units = (F.pad(matrix, (0, 0, 0, missing)) if missing else matrix).view(torch.int32)
        slabs = units.view(-1, SLAB, units.shape[1])
        if into is not None:
            into.data.copy_(slabs.transpose(1, 2))
            return into
        data = self._memory.empty((slabs.shape[0], slabs.shape[2], SLAB), torch.int32)
        data.copy_(slabs.transpose(1, 2))
        return SlabWeights(self._format, outputs, inputs, data)
