"""The linear kernels against exact products of what the weights store, for every way in which rows are multiplied."""

import pytest
import torch
from torch import Tensor

from tests.model_worker.cpu.slab_packing import pack_int4, pack_int8, quantize_groups, quantize_rows
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import GROUP, SlabWeights, WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat

BF16, FP32 = torch.bfloat16, torch.float32
# Of a row's norm. In bf16 the output is rounded; int4 weights may be too; and a value in the middle between two codes
# of 8 bits may go either way, which moves a row of few inputs by some of 1/127.
ROUNDING = {FP32: 2e-6, BF16: 4e-3}
IN_BYTES = {"avx512", "avx_vnni", "avx2", "neon_bf16", "neon_dotprod", "neon"}
SLACK = {WeightFormat.BF16: 0.0, WeightFormat.FP32: 0.0, WeightFormat.INT4: 2e-3, WeightFormat.INT8: 8e-3}
# Few and many outputs, whole slabs of 64 and parts of one, inputs that are no multiple of 64; several blocks of rows.
SHAPES = [(64, 32), (200, 96), (130, 448), (1024, 1024)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 32, 33, 48, 49, 100, 170]


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    """On two threads, whatever OMP_NUM_THREADS says, so that work is split."""
    loaded = load(threads=2)
    assert loaded is not None, "these tests need a C++ compiler"
    return loaded


def values(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    """Rows of different sizes with a few large values, as activations and weights have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[:, :: shape[1] // 4] *= 8
    return (x * torch.logspace(-2, 2, shape[0]).unsqueeze(1)).to(dtype)


def pack(kernels: CpuKernels, kind: WeightFormat, matrix: Tensor) -> tuple[SlabWeights, Tensor]:
    """The packed matrix, and what it stores in fp64."""
    if kind in (WeightFormat.BF16, WeightFormat.FP32):
        matrix = matrix.to(FP32 if kind is WeightFormat.FP32 else BF16)
        return SlabFormat(kernels, kind)(matrix).weights, matrix.double()
    if kind is WeightFormat.INT8:
        codes, scales = quantize_rows(matrix)
        return pack_int8(matrix), codes.double() * scales.double().unsqueeze(1)
    codes, scales, offsets = quantize_groups(matrix)
    grouped = codes.double().view(matrix.shape[0], -1, GROUP)
    stored = (grouped - 8) * scales.double().unsqueeze(2) + offsets.double().unsqueeze(2)
    return pack_int4(matrix), stored.view(matrix.shape)


def dtypes_of(kind: WeightFormat) -> tuple[torch.dtype, ...]:
    """Those of x that meet such weights."""
    return {WeightFormat.BF16: (BF16,), WeightFormat.FP32: (FP32,)}.get(kind, (BF16, FP32))


def groups_in_bytes(kernels: CpuKernels, kind: WeightFormat, dtype: torch.dtype) -> bool:
    """Whether groups of x are rounded to 8 bits: for int4, on a CPU without AVX512-BF16."""
    return kind is WeightFormat.INT4 and dtype is BF16 and kernels.instruction_set in IN_BYTES


def as_met(kernels: CpuKernels, kind: WeightFormat, x: Tensor) -> Tensor:
    """x in fp64 as weights of that kind meet it: rows, or groups, may be in whole numbers of 1/127 of their largest."""
    if kind is WeightFormat.INT8:
        groups = x.unsqueeze(1)
    elif groups_in_bytes(kernels, kind, x.dtype):
        groups = x.view(x.shape[0], -1, GROUP)
    else:
        return x.double()
    largest = groups.float().abs().amax(2, keepdim=True).clamp_min(1e-30)
    return ((groups.double() * (127 / largest).double()).round() * (largest / 127).double()).view(x.shape)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest error of any row, in units of that row's norm."""
    return float(((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def limit(kernels: CpuKernels, kind: WeightFormat, dtype: torch.dtype) -> float:
    if groups_in_bytes(kernels, kind, dtype):
        return ROUNDING[dtype] + SLACK[WeightFormat.INT8]
    return ROUNDING[dtype] + (SLACK[kind] if dtype is BF16 else 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", WeightFormat)
def test_products_are_those_of_what_is_stored(kernels: CpuKernels, kind: WeightFormat, shape: tuple[int, int]) -> None:
    weights, stored = pack(kernels, kind, values(*shape, seed=1))
    for dtype in dtypes_of(kind):
        for rows in ROWS if dtype is dtypes_of(kind)[0] else (1, 5, 33):
            x = values(rows, shape[1], seed=rows, dtype=dtype)
            exact = as_met(kernels, kind, x)
            product = kernels.linear(x, weights)
            assert product.dtype == dtype
            assert relative(product, exact @ stored.T) < limit(kernels, kind, dtype), (dtype, rows)


@pytest.mark.parametrize("kind", WeightFormat)
def test_no_rows(kernels: CpuKernels, kind: WeightFormat) -> None:
    weights, _ = pack(kernels, kind, values(200, 96, seed=1))
    for dtype in dtypes_of(kind):
        assert kernels.linear(torch.empty((0, 96), dtype=dtype), weights).shape == (0, 200)


@pytest.mark.parametrize("kind", WeightFormat)
def test_several_blocks_of_rows(kernels: CpuKernels, kind: WeightFormat) -> None:
    """1,300 rows come in three blocks."""
    weights, stored = pack(kernels, kind, values(1000, 1024, seed=2))
    x = values(1300, 1024, seed=3, dtype=dtypes_of(kind)[0])
    exact = as_met(kernels, kind, x)
    assert relative(kernels.linear(x, weights), exact @ stored.T) < limit(kernels, kind, x.dtype)


@pytest.mark.parametrize("kind", WeightFormat)
@pytest.mark.parametrize("rows", [1, 4, 12, 40])
def test_rows_apart(kernels: CpuKernels, kind: WeightFormat, rows: int) -> None:
    """Rows that are part of wider ones."""
    weights, _ = pack(kernels, kind, values(96, 64, seed=4))
    wide = values(rows, 160, seed=5, dtype=dtypes_of(kind)[0])
    x = wide[:, 32:96]
    assert torch.equal(kernels.linear(x, weights), kernels.linear(x.contiguous(), weights))


@pytest.mark.parametrize("kind", WeightFormat)
@pytest.mark.parametrize("rows", [3, 12, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows_and_stays_alone(
    kernels: CpuKernels, kind: WeightFormat, rows: int, value: float
) -> None:
    weights, _ = pack(kernels, kind, values(64, 64, seed=6))
    x = values(rows, 64, seed=7, dtype=dtypes_of(kind)[0])
    expected = kernels.linear(x, weights)
    x[1, 5] = value
    product = kernels.linear(x, weights)
    assert not product[1].isfinite().any()
    others = torch.arange(rows) != 1
    assert torch.equal(product[others], expected[others])


@pytest.mark.parametrize("kind", WeightFormat)
def test_zeros(kernels: CpuKernels, kind: WeightFormat) -> None:
    weights, _ = pack(kernels, kind, values(64, 64, seed=8))
    zeros = torch.zeros(2, 64, dtype=dtypes_of(kind)[0])
    assert torch.equal(kernels.linear(zeros, weights), zeros)
    nothing, _ = pack(kernels, kind, torch.zeros(64, 64, dtype=BF16))
    assert torch.equal(kernels.linear(values(2, 64, seed=9, dtype=zeros.dtype), nothing), zeros)


@pytest.mark.parametrize("kind", [WeightFormat.INT8, WeightFormat.FP32])
def test_a_row_does_not_depend_on_the_others(kernels: CpuKernels, kind: WeightFormat) -> None:
    weights, _ = pack(kernels, kind, values(200, 448, seed=10))
    x = values(200, 448, seed=11, dtype=dtypes_of(kind)[-1])
    whole = kernels.linear(x, weights)
    for rows in (1, 2, 3, 7, 8, 9, 16, 17, 64, 159, 160):
        assert torch.equal(kernels.linear(x[:rows], weights), whole[:rows]), rows


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_of_a_matrix_come_back(kernels: CpuKernels, dtype: torch.dtype) -> None:
    matrix = values(200, 83, seed=12, dtype=dtype)
    kept = SlabFormat(kernels, WeightFormat.FP32 if dtype is FP32 else WeightFormat.BF16)(matrix)
    assert kept.keeps_rows
    few = torch.tensor([199, 0, 64, 63, 0])
    many = torch.arange(1000) * 7 % 200
    for ids in (few, many, few.to(torch.int32), torch.stack((few, few), 1)[:, 0], few[:0]):
        assert torch.equal(kept.rows(ids), matrix[ids])


@pytest.mark.parametrize("kind", WeightFormat)
def test_inputs_that_are_no_multiple_of_a_group(kernels: CpuKernels, kind: WeightFormat) -> None:
    dtype = dtypes_of(kind)[0]
    matrix, x = values(70, 83, seed=15, dtype=dtype), values(9, 83, seed=16, dtype=dtype)
    product = SlabFormat(kernels, kind)(matrix).multiply(x)
    allowed = {WeightFormat.FP32: 2e-6, WeightFormat.BF16: 4e-3, WeightFormat.INT8: 0.02, WeightFormat.INT4: 0.15}
    assert relative(product, x.double() @ matrix.double().T) < allowed[kind]


def test_int4_codes_lose_little_of_their_group() -> None:
    """Uniform values in 16 levels have an error of 1/sqrt(12) of a level: 1/15 of the range at most."""
    weights = torch.rand(32, 8 * GROUP)
    codes, scales, offsets = quantize_groups(weights)
    assert codes.min() == 0
    assert codes.max() == 15
    grouped = codes.float().view(32, -1, GROUP)
    stored = (grouped - 8) * scales.float().unsqueeze(2) + offsets.float().unsqueeze(2)
    assert (stored.view_as(weights) - weights).std() < 1.01 / 15 / 12**0.5


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_packed_as_torch_does_it(kernels: CpuKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = values(*shape, seed=13, dtype=dtype)
    matrix[shape[0] // 2] = 0
    packed, wanted = SlabFormat(kernels, WeightFormat.INT8)(matrix).weights, pack_int8(matrix)
    rows = len(wanted.data) * 64
    assert wanted.scales is not None
    assert packed.scales is not None
    assert torch.equal(packed.scales, wanted.scales)
    filled = torch.arange(rows).view(-1, 64) < shape[0]  # what fills up the last slab may be anything
    assert torch.equal(packed.data.transpose(1, 2)[filled], wanted.data.transpose(1, 2)[filled])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_packed_as_torch_does_it(kernels: CpuKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums in another order may move a scale by a unit of bf16, and with it codes in the middle between two."""
    matrix = values(*shape, seed=14, dtype=dtype)
    matrix[shape[0] // 2] = 0
    matrix[0, :GROUP] = 3
    packed, wanted = SlabFormat(kernels, WeightFormat.INT4)(matrix).weights, pack_int4(matrix.to(BF16))
    ends = [weights.data[:, :, GROUP // 8].contiguous().view(BF16) for weights in (packed, wanted)]
    torch.testing.assert_close(*ends, rtol=2**-6, atol=1e-6)
    nibbles = [
        torch.stack([weights.data[:, :, : GROUP // 8] >> (4 * place) & 15 for place in range(8)])
        for weights in (packed, wanted)
    ]
    assert (nibbles[0] == nibbles[1]).float().mean() > 0.99
    assert (nibbles[0] - nibbles[1]).abs().max() <= 1


def test_memory_is_used_once_and_aligned() -> None:
    memory = HugeMemory()
    parts = [memory.empty((n, 33), torch.bfloat16) for n in (1, 7, 3_000_000, 5)]
    for number, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        assert part.is_contiguous()
        part.fill_(number)
    assert [int(part.float().min()) for part in parts] == [int(part.float().max()) for part in parts] == [0, 1, 2, 3]
