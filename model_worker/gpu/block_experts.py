"""Experts in e4m3 with a scale for each block of 128 x 128, as they are published; kernels widen them as they go."""

from typing import Self

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.experts import SCALE_BLOCK

BLOCK: int = SCALE_BLOCK.value
FP8, LARGEST = torch.float8_e4m3fn, 448.0


class BlockExperts:
    """A `StackedMatrices` (qwen3/layers/matrix.py). codes: [E, O, I] e4m3; scales: [E, O / BLOCK, I / BLOCK] fp32."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        assert codes.dtype == FP8
        assert scales.shape == (len(codes), *(side // BLOCK for side in codes.shape[1:]))
        self.codes, self.scales = codes, scales
        self.nbytes = codes.nbytes + scales.nbytes

    @classmethod
    def of(cls, plain: Tensor) -> Self:
        """Of other numbers, [E, O, I] of any float."""
        experts, outputs, inputs = plain.shape
        codes = torch.empty(plain.shape, dtype=FP8, device=plain.device)
        scales = torch.empty((experts, outputs // BLOCK, inputs // BLOCK), device=plain.device)
        for expert, matrix in enumerate(plain):  # one at a time is little memory
            blocks = matrix.float().view(outputs // BLOCK, BLOCK, -1, BLOCK)
            scales[expert] = (blocks.abs().amax((1, 3)) / LARGEST).clamp_min_(1e-12)
            codes[expert] = (blocks / scales[expert][:, None, :, None]).view(outputs, inputs).to(FP8)
        return cls(codes, scales)

    def plain(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return (self.codes.to(torch.float32) * scales).to(dtype)

    def take(self, other: "BlockExperts") -> None:
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)

    def refill(self, plain: Tensor) -> None:
        self.take(self.of(plain))
