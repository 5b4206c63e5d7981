"""The fused element-wise kernels against transformers' Qwen3 modules."""

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.model_worker.int8_cache import empty_int8_cache
from vibe_sgl_lite.model_worker.cpu import CpuKernels, LayerCache, load
from vibe_sgl_lite.model_worker.kv_int8 import quantize

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
EPS = 1e-6


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    """On two threads, whatever OMP_NUM_THREADS says, so that work is split and merged."""
    loaded = load(threads=2)
    assert loaded is not None, "these tests need a C++ compiler"
    return loaded


def close(actual: Tensor, wanted: Tensor) -> None:
    """fp32 to 1e-5; bf16 to one unit in the last place, and almost everywhere exactly."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=2**-7)
        assert (actual == wanted).float().mean() > 0.99


def norm(weight: Tensor) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(weight.shape[0], EPS)
    module.weight.data = weight
    return module


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 1024), (7, 1024), (3, 100), (40, 2560), (2, 8)])
def test_add_rms_norm(kernels: CpuKernels, dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(rows + size)
    x, residual, weight = (
        torch.randn(rows, size).to(dtype),
        torch.randn(rows, size).to(dtype),
        torch.randn(size).to(dtype),
    )
    total = residual + x
    out = kernels.add_rms_norm(x, residual, weight, EPS)
    assert out is x
    assert torch.equal(residual, total)
    close(out, norm(weight)(total))


@DTYPES
def test_norms_of_what_is_not_finite(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """A NaN, of either sign and with any bits, stays one and makes its whole row one; so does an infinity."""
    x, residual = torch.ones(6, 100).to(dtype), torch.zeros(6, 100).to(dtype)
    for row, bits in enumerate((0x7F81, 0x7FFF, 0xFF81, 0xFFFF, 0x7F80)):
        x[row, 17 * row] = torch.tensor([bits]).to(torch.int16).view(torch.bfloat16)[0]
    wanted = x.clone()
    out = kernels.add_rms_norm(x, residual, torch.ones(100, dtype=dtype), EPS)
    torch.testing.assert_close(residual, wanted, rtol=0, atol=0, equal_nan=True)
    assert out[:4].isnan().all()
    assert not out[4].isfinite().all()
    assert out[5].isfinite().all()


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 16, 8, 128), (5, 4, 2, 64), (60, 16, 8, 128), (3, 3, 1, 40), (4, 2, 2, 8)],
)
def test_qkv_rope_store(
    kernels: CpuKernels, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    query_weight, key_weight = torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)
    angles = torch.randint(4000, (tokens, 1)) / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pool = torch.zeros(2, tokens + 3, 4, kv_heads, head_dim, dtype=dtype)
    slots = torch.randperm(4 * (tokens + 3))[:tokens]

    out = kernels.qkv_rope_store(qkv, query_weight, key_weight, EPS, cos, sin, LayerCache(pool[0], pool[1]), slots)

    query, key, value = torch.split(qkv.view(tokens, -1, head_dim), [heads, kv_heads, kv_heads], 1)
    query, key = apply_rotary_pos_emb(
        norm(query_weight)(query).transpose(0, 1).unsqueeze(0),
        norm(key_weight)(key).transpose(0, 1).unsqueeze(0),
        torch.cat((cos, cos), -1).unsqueeze(0),
        torch.cat((sin, sin), -1).unsqueeze(0),
    )
    close(out, query[0].transpose(0, 1))
    flat = pool.flatten(1, 2)
    close(flat[0, slots], key[0].transpose(0, 1))
    assert torch.equal(flat[1, slots], value)
    untouched = torch.ones(flat.shape[1], dtype=torch.bool)
    untouched[slots] = False
    assert (flat[:, untouched] == 0).all()


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "page_size", "kv_heads", "head_dim"), [(1, 16, 8, 128), (9, 1, 2, 64), (60, 16, 8, 128), (7, 4, 1, 40)]
)
def test_int8_stores_are_exactly_what_torch_quantises(
    kernels: CpuKernels, dtype: torch.dtype, tokens: int, page_size: int, kv_heads: int, head_dim: int
) -> None:
    """Of what a cache of the model's dtype would hold; and nothing else is written."""
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, 4 * kv_heads, head_dim)
    qkv *= torch.logspace(-4, 4, tokens).view(-1, 1, 1)  # keys are normalised, values are of all sizes
    qkv[0, -1] = 0  # a value of no size
    qkv = qkv.to(dtype)
    weight, angles = torch.randn(head_dim).to(dtype), torch.rand(tokens, head_dim // 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages = tokens // page_size + 3
    slots = torch.randperm(pages * page_size)[:tokens]
    plain = LayerCache(*torch.zeros(2, pages, page_size, kv_heads, head_dim, dtype=dtype))
    page, place = slots // page_size, slots % page_size

    def check(cache: LayerCache) -> None:
        for stored, codes, scales in (
            (plain.keys, cache.keys, cache.key_scales),
            (plain.values, cache.values, cache.value_scales),
        ):
            assert scales is not None
            wanted_codes, wanted_scales = quantize(stored[page, place])
            assert torch.equal(codes[page, place], wanted_codes)
            assert torch.equal(scales[page, :, place], wanted_scales)
            codes[page, place] = -1
            scales[page, :, place] = torch.nan
            assert (codes == -1).all()
            assert scales.isnan().all()

    queries = kernels.qkv_rope_store(qkv.flatten(1), weight, weight, EPS, cos, sin, plain, slots)
    cache = empty_int8_cache(pages, page_size, kv_heads, head_dim)
    assert torch.equal(kernels.qkv_rope_store(qkv.flatten(1), weight, weight, EPS, cos, sin, cache, slots), queries)
    check(cache)


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_int8_scales_of_what_is_not_finite_are_not_finite(kernels: CpuKernels, dtype: torch.dtype, bad: float) -> None:
    for at in range(40):
        qkv, weight, angles = torch.randn(1, 120).to(dtype), torch.ones(40, dtype=dtype), torch.ones(1, 20, dtype=dtype)
        qkv[0, 80 + at] = bad  # of the value
        cache = empty_int8_cache(2, 1, 1, 40)
        kernels.qkv_rope_store(qkv, weight, weight, EPS, angles, angles, cache, torch.tensor([0]))
        assert cache.key_scales is not None
        assert cache.key_scales[0].isfinite().all()
        assert cache.value_scales is not None
        assert not cache.value_scales[0].isfinite().any()


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 3072), (9, 3072), (3, 100), (30, 3072)])
def test_silu_mul(kernels: CpuKernels, dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(rows + size)
    gate_up = (torch.randn(rows, 2 * size) * 8).to(dtype)
    gate_up[0, :4] = torch.tensor([-3000.0, 3000.0, 0.0, -100.0])
    gate, up = gate_up.chunk(2, -1)
    close(kernels.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 151936), (5, 1000), (9, 33)])
def test_argmax(kernels: CpuKernels, dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(rows + size)
    logits = torch.randn(rows, size).to(dtype)  # bf16 has ties enough
    lowest = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(kernels.argmax(logits), lowest)


@DTYPES
def test_argmax_of_special_values(kernels: CpuKernels, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 3000).to(dtype)
    logits[0] = -torch.inf
    logits[1, [70, 2999]] = torch.inf
    logits[2, [2000, 2500]] = torch.nan
    logits[3, [2998, 2999]] = 1
    assert kernels.argmax(logits).tolist() == [0, 70, 2000, 2998]
