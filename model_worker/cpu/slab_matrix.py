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

BAND_ELEMENTS = 1 << 20  # put at once: they stay in the caches of most CPUs until they are in their place


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
        """Of int8, in fp32; of int4, none."""
        return self._kernels.gather_rows(self.weights, ids)[:, : self._inputs]

    def refill(self, matrix: Tensor) -> None:
        self.put(slice(0, self.weights.outputs), matrix)

    def put(self, rows: slice, values: Tensor) -> None:
        """Take whole slabs of rows, but for the matrix's last ones. values: [rows, I] bf16 or fp32, as the format has
        it; int8 and int4 take both.

        int4 rounds to bf16 first, which loses far less than its codes do.
        """
        weights = self.weights
        assert rows.start % SLAB == 0
        assert rows.stop % SLAB == 0 or rows.stop == weights.outputs
        values = F.pad(values, (0, self.padding)) if self.padding else values.contiguous()  # to pad by 0 is to copy
        data = weights.data[rows.start // SLAB : -(-rows.stop // SLAB)]
        if weights.format in (WeightFormat.BF16, WeightFormat.FP32):
            missing = -len(values) % SLAB
            units = (F.pad(values, (0, 0, 0, missing)) if missing else values).view(torch.int32)
            data.copy_(units.view(-1, SLAB, units.shape[1]).transpose(1, 2))
            return
        scales = None if weights.scales is None else weights.scales[rows]
        self._kernels.pack(values, SlabWeights(weights.format, len(values), weights.inputs, data, scales))


class SlabFormat:
    """A `GradualFormat` (qwen3/layers/matrix.py): makes matrices of one format for `kernels`, all in the same memory.

    memory: None for new memory.
    """

    def __init__(self, kernels: CpuKernels, weight_format: WeightFormat, memory: HugeMemory | None = None) -> None:
        self._kernels, self._format = kernels, weight_format
        self._memory = memory or HugeMemory()

    def __call__(self, matrix: Tensor) -> SlabMatrix:
        made = self.empty(*matrix.shape)
        made.refill(matrix)
        return made

    def bands(self, outputs: int, inputs: int) -> list[slice]:
        step = max(1, BAND_ELEMENTS // inputs // SLAB) * SLAB
        return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]

    def empty(self, outputs: int, inputs: int) -> SlabMatrix:
        slabs, padded = -(-outputs // SLAB), -(-inputs // INPUT_MULTIPLE) * INPUT_MULTIPLE
        units = {
            WeightFormat.BF16: (padded // 2,),
            WeightFormat.INT8: (padded // 4,),
            WeightFormat.INT4: (padded // GROUP, GROUP // 8 + 1),
            WeightFormat.FP32: (padded,),
        }[self._format]
        scales = torch.zeros(slabs * SLAB) if self._format is WeightFormat.INT8 else None
        data = self._memory.empty((slabs, *units, SLAB), torch.int32)
        return SlabMatrix(self._kernels, SlabWeights(self._format, outputs, padded, data, scales), inputs)
