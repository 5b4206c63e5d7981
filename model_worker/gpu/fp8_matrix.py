"""Matrices in fp8 (e4m3) with a scale an output, multiplied with rows in fp8 with a scale a row.

Some rows take `torch._scaled_mm`, on the card's fp8 units. A few, for which a step is as long as its weights take to be
read, keep their bits and take a kernel of their own (kernels/fp8_product.py).
"""

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.fp8_product import encode_rows, fp8_gemv
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.qwen3.layers.matrix import ProductOnly

FP8, LARGEST = torch.float8_e4m3fn, 448.0
MULTIPLE = 16  # of inputs and outputs: what the card's fp8 units want
FEW_ROWS = 4  # up to which rows stay as they are


def encode_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes of that shape, and scales, [out] fp32."""
    scales = matrix.abs().amax(1).float().div_(LARGEST).clamp_(min=1e-12)
    return (matrix.float() / scales[:, None]).to(FP8), scales


class Fp8Matrix(ProductOnly):
    """One of them, of a matrix in bf16 on a GPU whose sides are multiples of `MULTIPLE`."""

    def __init__(self, matrix: Tensor) -> None:
        self.codes, self.scales = encode_matrix(matrix)
        self.nbytes = self.codes.nbytes + self.scales.nbytes
        self._pdl = has_dependent_launch(matrix.device)

    def refill(self, matrix: Tensor) -> None:
        codes, scales = encode_matrix(matrix)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def multiply(self, x: Tensor) -> Tensor:
        rows, outputs = len(x), len(self.codes)
        if rows <= FEW_ROWS:
            output = x.new_empty((rows, outputs))
            fp8_gemv(x, self.codes, self.scales, output, pdl=self._pdl)
            return output
        codes, scales = torch.empty_like(x, dtype=FP8), torch.empty(rows, dtype=torch.float32, device=x.device)
        encode_rows(x, codes, scales, pdl=self._pdl)
        product: Tensor = torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=scales[:, None],
            scale_b=self.scales[None, :],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return product
