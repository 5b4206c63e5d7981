"""Matrices of the model that the linear kernels multiply by."""

import torch
from torch import Tensor

from model_worker.cpu_kernels import CpuKernels
from model_worker.cpu_kernels.huge_memory import HugeMemory
from model_worker.cpu_kernels.linear import (
    SLAB,
    SlabWeights,
    empty_int4,
    fill_int4,
    pack_bf16,
    pack_int8,
)
from qwen3.quantization_int4 import quantize_groups
from qwen3.quantization_int8 import quantize_rows
from qwen3.weight import Matrix, ProductOnly

CHUNK = 16 * SLAB  # rows quantised at a time, so that what is in between stays small


class SlabMatrix:
    """bf16, with all its bits: the one kept for both a head and an embedding that are tied."""

    keeps_rows = True

    def __init__(self, kernels: CpuKernels, weights: SlabWeights) -> None:
        self._kernels, self.weights = kernels, weights
        self.nbytes = weights.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        return self._kernels.linear(x, self.weights)

    def rows(self, ids: Tensor) -> Tensor:
        return self._kernels.gather_rows(self.weights, ids)


class QuantizedSlabMatrix(ProductOnly):
    """int8 or int4. In int8, a row that is not finite gives one that is not."""

    def __init__(self, kernels: CpuKernels, weights: SlabWeights) -> None:
        self._kernels, self.weights = kernels, weights
        self.nbytes = weights.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        return self._kernels.linear(x, self.weights)


class SlabFormats:
    """Makers of matrices for `kernels`, each a `qwen3.weight.MatrixFormat`, all in the same memory."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._memory = HugeMemory()

    def bf16(self, matrix: Tensor) -> Matrix:
        return SlabMatrix(self._kernels, pack_bf16(matrix, self._memory))

    def int8(self, matrix: Tensor) -> Matrix:
        codes = torch.empty(matrix.shape, dtype=torch.int8)
        scales = torch.empty(matrix.shape[0])
        for start in range(0, matrix.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            codes[rows], scales[rows] = quantize_rows(matrix[rows])
        return QuantizedSlabMatrix(self._kernels, pack_int8(codes, scales, self._memory))

    def int4(self, matrix: Tensor) -> Matrix:
        outputs, inputs = matrix.shape
        weights = empty_int4(outputs, inputs, self._memory)
        for start in range(0, outputs, CHUNK):
            # The kernels take scales in bf16. A matrix in fp32 is rounded first: the codes lose far more.
            fill_int4(weights, start, *quantize_groups(matrix[start : start + CHUNK].to(torch.bfloat16)))
        return QuantizedSlabMatrix(self._kernels, weights)
