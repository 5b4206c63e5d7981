"""Matrices in the layout that the linear kernels read; native/linear.h draws it. O outputs, I inputs."""

from enum import IntEnum
from typing import Any

from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.library import structures

SLAB = 64  # outputs that lie side by side
GROUP = 32  # inputs that share a scale and an offset in int4
INPUT_MULTIPLE = 32


class WeightFormat(IntEnum):
    """As native/linear.h numbers them."""

    BF16 = 0
    INT8 = 1
    INT4 = 2
    FP32 = 3


class SlabWeights:
    """One [O, I] matrix, filled up with zeros until I is a multiple of INPUT_MULTIPLE. Made by slab_matrix.py."""

    def __init__(
        self, weight_format: WeightFormat, outputs: int, inputs: int, data: Tensor, scales: Tensor | None = None
    ) -> None:
        assert inputs % INPUT_MULTIPLE == 0
        self.format = weight_format
        self.outputs, self.inputs = outputs, inputs
        self.data, self.scales = data, scales
        self.nbytes = data.nbytes + (0 if scales is None else scales.nbytes)
        self.place: Any = structures()["Matrix"](
            data.data_ptr(), None if scales is None else scales.data_ptr(), inputs, outputs, int(weight_format)
        )
