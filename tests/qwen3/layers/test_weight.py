"""Matrices as they are kept: the same products as a plain matrix, and in fp32 for any number of rows the same bits."""

import pytest
import torch

from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixWeight

CPU = torch.device("cpu")
# A long sum with few outputs is where a library would split one row's work another way than many rows'.
SHAPES = [(256, 64), (256, 768), (1024, 3072), (96, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_plain_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = MatrixWeight(*shape, dtype, CPU)
    matrix = torch.randn(shape).to(dtype)
    weight.install(matrix.clone())
    for rows in (1, 2, 16, 33):
        x = torch.randn(rows, shape[1]).to(dtype)
        expected = x.double() @ matrix.double().T
        product = weight.multiply(x)
        assert product.is_contiguous()
        assert product.dtype == dtype
        error = (product.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_in_fp32_does_not_depend_on_the_others(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = MatrixWeight(*shape, torch.float32, CPU)
    weight.install(torch.randn(shape))
    x = torch.randn(130, shape[1])
    whole = weight.multiply(x)
    for rows in (1, 2, 3, 7, 16, 17, 64):
        assert torch.equal(weight.multiply(x[:rows]), whole[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_multiply_the_rows_that_are_theirs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = ExpertWeight(4, 48, 64, dtype, CPU)
    matrices = torch.randn(4, 48, 64).to(dtype)
    weight.install(matrices.clone())
    counts = [3, 0, 1, 9]
    x = torch.randn(13, 64).to(dtype)
    expected = torch.cat(
        [part.double() @ m.double().T for part, m in zip(torch.split(x, counts), matrices, strict=True)]
    )
    product = weight.multiply_grouped(x, torch.tensor(counts)).double()
    assert (product - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 3e-3)
