"""Matrices of the model that the linear kernels multiply by."""

from torch import Tensor

from vibe_sgl_lite.model_worker.cpu import CpuKernels
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import SlabWeights
from vibe_sgl_lite.model_worker.cpu.packing import pack_bf16, pack_int4, pack_int8
from vibe_sgl_lite.qwen3.layers.weight import Matrix, ProductOnly


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
    """Makers of matrices for `kernels`, each a `MatrixFormat` (qwen3/layers/weight.py), all in the same memory."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._memory = HugeMemory()

    def bf16(self, matrix: Tensor) -> Matrix:
        return SlabMatrix(self._kernels, pack_bf16(matrix, self._memory))

    def int8(self, matrix: Tensor) -> Matrix:
        return QuantizedSlabMatrix(self._kernels, pack_int8(self._kernels, matrix, self._memory))

    def int4(self, matrix: Tensor) -> Matrix:
        return QuantizedSlabMatrix(self._kernels, pack_int4(self._kernels, matrix, self._memory))
