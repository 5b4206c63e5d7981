"""Products with matrices in fp8 against the same numbers in fp64."""

import pytest
import torch

from vibe_sgl_lite.model_worker.gpu.fp8_matrix import FEW_ROWS, FP8, Fp8Matrix, encode_matrix
from vibe_sgl_lite.model_worker.gpu.kernels.fp8_product import encode_rows, fp8_gemv


def test_rows_in_fp8_are_the_nearest_ones(device: torch.device) -> None:
    x = torch.randn((5, 48), device=device).to(torch.float16)
    x[1] = 0
    x[2, 7] = 3000.0
    x[4, 3] = float("inf")
    codes, scales = torch.empty((5, 48), dtype=FP8, device=device), torch.empty(5, device=device)
    encode_rows(x, codes, scales, pdl=False)
    assert scales.isnan().tolist() == [False, False, False, False, True]
    torch.testing.assert_close(scales[:4] * 448, x[:4].float().abs().amax(1), rtol=1e-6, atol=0)
    nearest = (x[[0, 2, 3]].float() / scales[[0, 2, 3], None]).to(FP8)
    assert torch.equal(codes[[0, 2, 3]].float(), nearest.float())
    assert not codes[1].float().any()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 48, 40), (3, 128, 21)])
def test_a_few_rows_keep_their_bits(rows: int, inputs: int, outputs: int, device: torch.device) -> None:
    x = torch.randn((rows, inputs), device=device).to(torch.float16)
    codes, scales = encode_matrix(torch.randn((outputs, inputs), device=device) * inputs**-0.5)
    output = torch.empty((rows, outputs), dtype=torch.float16, device=device)
    fp8_gemv(x, codes, scales, output, pdl=False)
    expected = x.double() @ (codes.double() * scales.double()[:, None]).T
    torch.testing.assert_close(output.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 33])
def test_a_matrix_in_fp8_multiplies_as_closely_as_its_codes_allow(rows: int, device: torch.device) -> None:
    """A row and a matrix of random numbers, each within 1/16 of what it was."""
    matrix = (torch.randn((96, 64), device=device) * 64**-0.5).to(torch.bfloat16)
    kept = Fp8Matrix(matrix)
    assert kept.nbytes == 96 * 64 + 96 * 4
    x = torch.randn((rows, 64), device=device).to(torch.bfloat16)
    product = kept.multiply(x)
    expected = x.double() @ matrix.double().T
    assert product.dtype == torch.bfloat16
    error = float((product.double() - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.06
