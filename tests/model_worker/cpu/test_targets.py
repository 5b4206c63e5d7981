"""The same kernels compiled for lesser CPUs: each path is the fast one somewhere, so all are tested everywhere."""

from pathlib import Path

import pytest
import torch

from tests.model_worker.cpu import test_attention as attention
from tests.model_worker.cpu import test_elementwise as elementwise
from tests.model_worker.cpu import test_linear as linear
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat

BF16, FP32 = torch.bfloat16, torch.float32

# What they can do -> compiler flags. -O1: half the compile time.
TARGETS: dict[str, tuple[str, ...]] = {"generic": ("-O1",)}
CPU_INFO = Path("/proc/cpuinfo")
FEATURES = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
if "avx2" in FEATURES:
    TARGETS["avx"] = ("-O1", "-march=x86-64-v3")
if "avx512_bf16" in FEATURES:
    TARGETS["avx512_bf16"] = ("-O1", "-march=native", "-mno-amx-tile")


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    loaded = load(threads=2, target=TARGETS[request.param])
    assert loaded is not None
    assert loaded.instruction_set == request.param
    return loaded


@attention.INT8
@pytest.mark.parametrize("seed", range(6))
def test_attention(kernels: CpuKernels, seed: int, int8: bool) -> None:
    attention.test_decode_and_chunk_rows_in_one_call(kernels, seed, int8)


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
def test_elementwise(kernels: CpuKernels, dtype: torch.dtype) -> None:
    elementwise.test_rms_norm(kernels, dtype, 3, 100)
    elementwise.test_add_rms_norm(kernels, dtype, 7, 1024)
    elementwise.test_qkv_rope_store(kernels, dtype, 5, 4, 2, 64)
    elementwise.test_qkv_rope_store(kernels, dtype, 3, 3, 1, 40)
    elementwise.test_int8_stores_are_exactly_what_torch_quantises(kernels, dtype, 9, 4, 2, 64)
    elementwise.test_int8_stores_are_exactly_what_torch_quantises(kernels, dtype, 3, 1, 1, 40)
    elementwise.test_int8_scales_of_what_is_not_finite_are_not_finite(kernels, dtype, torch.nan)
    elementwise.test_silu_mul(kernels, dtype, 9, 3072)
    elementwise.test_argmax(kernels, dtype, 5, 1000)
    elementwise.test_argmax_of_special_values(kernels, dtype)


@pytest.mark.parametrize("kind", WeightFormat)
def test_linear(kernels: CpuKernels, kind: WeightFormat) -> None:
    linear.test_products_are_those_of_what_is_stored(kernels, kind, (200, 96))
    linear.test_products_are_those_of_what_is_stored(kernels, kind, (130, 448))
    linear.test_rows_apart(kernels, kind, 5)
    linear.test_a_row_that_is_not_finite_shows_and_stays_alone(kernels, kind, 12, float("inf"))
