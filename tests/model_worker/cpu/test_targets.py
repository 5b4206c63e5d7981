"""The same kernels compiled for lesser CPUs: each path is the fast one somewhere, so all are tested everywhere."""

import pytest
import torch

from tests.model_worker.cpu import test_attention as attention
from tests.model_worker.cpu import test_elementwise as elementwise
from tests.model_worker.cpu import test_linear as linear
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat
from vibe_sgl_lite.model_worker.cpu.targets import VARIABLE, choose_target, runnable_targets
from vibe_sgl_lite.runtime.errors import ConfigError

BF16, FP32 = torch.bfloat16, torch.float32
# -O1: a third of the compile time. Warnings are errors here, and only here: users have other compilers.
FLAGS = ("-O1", "-Werror")


@pytest.fixture(scope="module", params=[target.name for target in runnable_targets()])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """Of every target that this machine can execute: the tests' ids list them."""
    loaded = load(threads=2, target=request.param, flags=FLAGS)
    assert loaded is not None
    assert loaded.instruction_set == request.param
    return loaded


def test_a_target_is_forced_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    best = runnable_targets()[0]
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose_target() == best
    assert choose_target("baseline").name == "baseline"
    monkeypatch.setenv(VARIABLE, "baseline")
    assert choose_target().name == "baseline"
    assert choose_target(best.name) == best
    monkeypatch.setenv(VARIABLE, "sse9")
    with pytest.raises(ConfigError, match=f"{VARIABLE} is 'sse9', but this CPU runs .*baseline: use one") as refused:
        choose_target()
    assert refused.value.field == VARIABLE


@attention.INT8
@pytest.mark.parametrize("seed", range(6))
def test_attention(kernels: CpuKernels, seed: int, int8: bool) -> None:
    attention.test_decode_and_chunk_rows_in_one_call(kernels, seed, int8)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(8, 8), (16, 8), (9, 3), (8, 2), (10, 2), (12, 2), (7, 1), (16, 1), (12, 1)]
)
def test_decode_rows(kernels: CpuKernels, heads: int, kv_heads: int) -> None:
    attention.test_decode_rows(kernels, BF16, heads, kv_heads, 16, False)


@attention.INT8
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_head_dims(kernels: CpuKernels, dtype: torch.dtype, head_dim: int, int8: bool) -> None:
    attention.test_head_dims(kernels, dtype, head_dim, int8)


@attention.INT8
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("page_size", [4, 16])
def test_chunks_of_long_contexts(kernels: CpuKernels, dtype: torch.dtype, page_size: int, int8: bool) -> None:
    attention.test_chunks_of_long_contexts(kernels, dtype, page_size, 40, int8)
    attention.test_fp32_chunks_do_not_depend_on_the_batch(kernels, int8)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunks_at_the_edges_of_blocks(kernels: CpuKernels, dtype: torch.dtype) -> None:
    attention.test_chunks_at_the_edges_of_blocks(kernels, dtype, 6, 2, 24, 256, dtype == BF16)
    attention.test_chunks_at_the_edges_of_blocks(kernels, dtype, 7, 1, 64, 16, False)
    attention.test_a_token_of_a_chunk_sees_nothing_behind_it(kernels, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_elementwise(kernels: CpuKernels, dtype: torch.dtype) -> None:
    elementwise.test_add_rms_norm(kernels, dtype, 7, 1024)
    elementwise.test_add_rms_norm(kernels, dtype, 3, 100)
    elementwise.test_norms_of_what_is_not_finite(kernels, dtype)
    elementwise.test_qkv_rope_store(kernels, dtype, 5, 4, 2, 64)
    elementwise.test_qkv_rope_store(kernels, dtype, 3, 3, 1, 40)
    elementwise.test_int8_stores_are_exactly_what_torch_quantises(kernels, dtype, 9, 4, 2, 64)
    elementwise.test_int8_stores_are_exactly_what_torch_quantises(kernels, dtype, 3, 1, 1, 40)
    elementwise.test_int8_scales_of_what_is_not_finite_are_not_finite(kernels, dtype, torch.nan)
    elementwise.test_silu_mul(kernels, dtype, 9, 3072)
    elementwise.test_silu_mul(kernels, dtype, 3, 100)
    elementwise.test_argmax(kernels, dtype, 5, 1000)
    elementwise.test_argmax_of_special_values(kernels, dtype)


@pytest.mark.parametrize("kind", WeightFormat)
def test_linear(kernels: CpuKernels, kind: WeightFormat) -> None:
    linear.test_products_are_those_of_what_is_stored(kernels, kind, (200, 96))
    linear.test_products_are_those_of_what_is_stored(kernels, kind, (130, 448))
    linear.test_rows_apart(kernels, kind, 5)
    linear.test_a_row_that_is_not_finite_shows_and_stays_alone(kernels, kind, 12, float("inf"))
    linear.test_zeros(kernels, kind)
    linear.test_inputs_that_are_no_multiple_of_a_group(kernels, kind)


def test_rows_and_packing(kernels: CpuKernels) -> None:
    widened = {WeightFormat.BF16} if kernels.instruction_set in {"avx512", "avx_vnni", "avx2", "baseline"} else set()
    for kind in {WeightFormat.INT8, WeightFormat.FP32} | widened:
        linear.test_a_row_does_not_depend_on_the_others(kernels, kind)
    for dtype in (BF16, FP32):
        linear.test_rows_of_a_matrix_come_back(kernels, dtype)
        linear.test_int8_is_packed_as_torch_does_it(kernels, (200, 96), dtype)
        linear.test_int4_is_packed_as_torch_does_it(kernels, (200, 96), dtype)


def test_the_largest_int8_sums_are_exact(kernels: CpuKernels) -> None:
    """What saturates in 16 bits where pairs of products are added there, in every order of signs."""
    signs = torch.tensor([-1.0, 1.0])
    fours = torch.cartesian_prod(signs, signs, signs, signs).repeat(7, 1024)
    weights = SlabFormat(kernels, WeightFormat.INT8)(fours)
    for rows in (1, 3, 20, 100):
        x = fours[:rows].clone()
        x[-1] = torch.where(torch.arange(4096) < 2048, x[-1], -x[-1] / 127)  # the smallest codes as well
        torch.testing.assert_close(weights.multiply(x), x @ fours.T, rtol=1e-6, atol=1e-3)


def test_int8_sums_on_the_edge_of_16_bits(kernels: CpuKernels) -> None:
    """Products of four inputs are added in 16 bits where magnitudes say that they fit: a row for each sum of four."""
    inputs, ends = 1056, torch.tensor([-127.0, 127.0])
    matrix = torch.cartesian_prod(ends, ends, ends, ends, ends, ends, ends, ends).repeat(1, inputs // 8)
    weights = SlabFormat(kernels, WeightFormat.INT8)(matrix)
    for count in (5, 8, 100):
        x = torch.zeros(count, inputs)
        x[:, 0] = 127  # so that a row's codes are its values
        for row in range(count):
            four = torch.tensor([64, 64, 64, 60 + row % 8])[torch.randperm(4)] * ends[row % 2].sign()
            for place in range(1 + row % 5, inputs // 8, 1 + row % 3):
                half = 8 * place + 2 * (row % 2)
                x[row, [half, half + 1, half + 4, half + 5]] = four.float()
        assert torch.equal(weights.multiply(x), x @ matrix.T)
