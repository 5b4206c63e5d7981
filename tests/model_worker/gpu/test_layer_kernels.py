"""Norm, rotation, SiLU, embedding and few-row products against plain torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm, begin, silu_multiply
from vibe_sgl_lite.model_worker.gpu.kernels.gemv import gemv
from vibe_sgl_lite.model_worker.gpu.kernels.product import (
    ProductScratch,
    ProductTiles,
    added_product,
    begin_stream,
    normed_product,
)
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import ProductCut, rank_product
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import rope_store
from vibe_sgl_lite.qwen3.layers.rotary import RotaryEmbedding

DTYPES = (torch.float32, torch.float16)
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
def test_add_rms_norm(dtype: torch.dtype, add: bool, device: torch.device) -> None:
    x, residual = torch.randn((2, 5, 48), device=device).to(dtype)
    weight = torch.rand(48, device=device).to(dtype) + 0.5
    expected = residual + x if add else x.clone()
    output = torch.empty_like(x)
    add_rms_norm(x, residual, weight, 1e-6, output, pdl=False, add=add)
    assert torch.equal(residual, expected)
    close(output, F.rms_norm(expected.float(), (48,), weight.float(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 1500])
def test_silu_multiply(dtype: torch.dtype, width: int, device: torch.device) -> None:
    gate_up = torch.randn((3, 2 * width), device=device).to(dtype)
    output = torch.empty((3, width), dtype=dtype, device=device)
    silu_multiply(gate_up, output, pdl=False)
    close(output, F.silu(gate_up[:, :width].float()) * gate_up[:, width:].float())


def test_begin(device: torch.device) -> None:
    matrix, table = torch.randn((11, 24), device=device), torch.randn((7, 2, 8), device=device)
    ids = torch.tensor([3, 0, 10, 3], dtype=torch.int32, device=device)
    positions = torch.tensor([6, 1, 0, 5], dtype=torch.int32, device=device)
    update, residual = torch.full((2, 4, 24), float("nan"), device=device)
    angles = torch.full((4, 2, 8), float("nan"), device=device)
    begin(ids, positions, matrix, table, update, residual, angles, pdl=False)
    assert torch.equal(update, matrix[ids.long()])
    assert not residual.any()
    assert torch.equal(angles, table[positions.long()])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "dtype"),
    [
        (4, 2, 64, 16, torch.float32),
        (3, 3, 32, 6, torch.float16),
        (3, 3, 32, 6, torch.float32),
        (5, 1, 128, 64, torch.float16),
    ],
)
def test_rope_store(heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype, device: torch.device) -> None:
    tokens = 7
    qkv = torch.randn((tokens, (heads + 2 * kv_heads) * dim), device=device).to(dtype)
    norms = torch.rand((2, dim), device=device).to(dtype) + 0.5
    rotary = RotaryEmbedding(dim, 1e4, dtype, device)
    positions = torch.tensor([0, 1, 2, 299, 5, 128, 63], dtype=torch.int32, device=device)
    angles = rotary(positions)
    slots = torch.randperm(3 * page, device=device)[:tokens]
    pool = torch.full((3, 2, page, kv_heads, dim), float("nan"), dtype=dtype, device=device)
    keys, values = pool[:, 0], pool[:, 1]
    query = torch.empty((tokens, heads * dim), dtype=dtype, device=device)
    cache = LayerCache(keys, values)
    rope_store(qkv, norms[0], norms[1], (1e-6, 1e-6), angles.cos, angles.sin, slots, cache, query, pdl=False)
    packed = qkv.view(tokens, -1, dim)
    turned = [
        angles.rotate(F.rms_norm(packed[:, part], (dim,), norm, 1e-6))
        for part, norm in ((slice(heads), norms[0]), (slice(heads, heads + kv_heads), norms[1]))
    ]
    close(query, turned[0].flatten(1))
    close(keys[slots // page, slots % page], turned[1])
    assert torch.equal(values[slots // page, slots % page], packed[:, heads + kv_heads :])
    assert int(pool.isnan().any(-1).logical_not().sum()) == 2 * tokens * kv_heads  # nothing else was written

    codes = torch.full((2, 3, page, kv_heads, dim), 77, dtype=torch.int8, device=device)
    scales = torch.full((2, 3, kv_heads, page), -7.0, device=device)
    qkv[3, heads * dim + 1] = float("nan")  # of the first key
    integers = dtype == torch.float16
    cache = LayerCache.of_codes(codes[0], codes[1], scales[0], scales[1], integers=integers)
    before = qkv.clone()
    rope_store(qkv, norms[0], norms[1], (1e-6, 1e-6), angles.cos, angles.sin, slots, cache, query, pdl=False, keep=True)
    place = scales.transpose(2, 3)[:, slots // page, slots % page]
    bad = place.isnan()
    assert bad.nonzero().tolist() == [[0, 3, 0]]
    written = codes[:, slots // page, slots % page]
    written = written.float() if integers else written.view(FP8).float()
    kept, said = qkv.view(tokens, -1, dim), (written * place[..., None]).to(dtype)
    assert torch.equal(kept[:, :heads].nan_to_num(7.0), before.view(tokens, -1, dim)[:, :heads].nan_to_num(7.0))
    assert torch.equal(kept[:, heads : heads + kv_heads].nan_to_num(7.0), said[0].nan_to_num(7.0))
    assert torch.equal(kept[:, heads + kv_heads :], said[1])
    packed = before.view(tokens, -1, dim)
    largest, step = (127, 1.0) if integers else (448, 2**-8)
    meant = torch.stack((turned[1], packed[:, heads + kv_heads :])).float()[~bad]
    torch.testing.assert_close(place[~bad] * largest, meant.abs().amax(-1), atol=2e-3, rtol=2e-3)
    exact = packed[:, heads + kv_heads :].float() / place[1, ..., None]
    assert torch.equal(written[1], exact.round() if integers else exact.to(FP8).float())
    off = (written[~bad] * place[~bad][:, None] - meant).abs()
    relative = 0 if integers else 1 / 15
    assert (off <= meant.abs() * relative + place[~bad][:, None] * step * 0.51 + 2e-3).all()
    assert int((scales != -7).sum()) == 2 * tokens * kv_heads
    assert int((codes == 77).all(-1).logical_not().sum()) == 2 * tokens * kv_heads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 40), (128, 21)])
def test_gemv(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn((rows, inputs), device=device).to(dtype)
    matrix = (torch.randn((2 * outputs, inputs), device=device) * inputs**-0.5).to(dtype)
    gain = torch.rand(inputs, device=device).to(dtype) + 0.5
    addend = torch.randn((rows, outputs), device=device).to(dtype)
    product = x.double() @ matrix.double().T
    normal = F.rms_norm(x.double(), (inputs,), gain.double(), 1e-6) @ matrix.double().T
    output = torch.empty_like(addend)
    half = matrix[:outputs]

    gemv(x, half, output, pdl=False, block=8, warps=4)
    close(output, product[:, :outputs])
    gemv(x, half, output, pdl=False, block=8, warps=4, gain=gain, eps=1e-6)
    close(output, normal[:, :outputs])
    gemv(x, matrix, output, pdl=False, block=16, warps=4, gain=gain, eps=1e-6, silu=True)
    close(output, F.silu(normal[:, :outputs]) * normal[:, outputs:])
    expected = product[:, :outputs] + addend.double()
    gemv(x, half, addend, pdl=False, block=8, warps=4, addend=addend)
    close(addend, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "tiles"),
    [
        (5, ProductTiles(16, 32, 32, 1, 4, 2)),
        (21, ProductTiles(16, 32, 16, 3, 4, 3)),
        (70, ProductTiles(64, 16, 16, 2, 4, 2, matrix_first=True)),
    ],
)
def test_products_with_norm_sum_and_silu(
    rows: int, tiles: ProductTiles, dtype: torch.dtype, device: torch.device
) -> None:
    """As a layer runs them: a sum into the stream, a product of its norm, another one with SiLU."""
    inputs, width, outputs = 96, 192, 64
    x = torch.randn((rows, inputs), device=device).to(dtype)
    stream = torch.randn((rows, width), device=device).to(dtype)
    gain = torch.rand(width, device=device).to(dtype) + 0.5
    down = (torch.randn((width, inputs), device=device) * inputs**-0.5).to(dtype)
    matrix = (torch.randn((2 * outputs, width), device=device) * width**-0.5).to(dtype)
    scratch = ProductScratch(device, rows * width * tiles.splits, 100)
    gained, output = torch.full_like(stream, float("nan")), torch.empty((rows, outputs), dtype=dtype, device=device)
    squares = torch.full((rows, 8), float("nan"), device=device)
    eps = 1e-3

    begin_stream(stream, gain, gained, squares, pdl=False)
    close(gained, stream.double() * gain.double())
    torch.testing.assert_close(squares.double().sum(1), (stream.double() ** 2).sum(1), atol=1e-4, rtol=1e-5)

    expected = stream.double() + x.double() @ down.double().T
    squares = torch.full((rows, width // tiles.outputs), float("nan"), device=device)
    added_product(x, down, stream, gain, gained, squares, tiles, scratch, pdl=False)
    close(stream, expected)
    close(gained, stream.double() * gain.double())
    torch.testing.assert_close(squares.double().sum(1), (stream.double() ** 2).sum(1), atol=1e-4, rtol=1e-5)

    normal = F.rms_norm(stream.double(), (width,), gain.double(), eps) @ matrix.double().T
    parts = torch.zeros((rows, 16), device=device)
    parts[:, : squares.shape[1]] = squares
    for _ in range(2):  # the second finds what the first left behind
        normed_product(gained, parts, eps, matrix[outputs:], output, tiles, scratch, pdl=False)
        close(output, normal[:, outputs:])
    whole = replace(tiles, splits=1)
    normed_product(gained, parts, eps, matrix, output, whole, scratch, pdl=False, silu=True)
    close(output, F.silu(normal[:, :outputs]) * normal[:, outputs:])
    assert not scratch.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cut"),
    [
        (5, ProductCut(16, 32, 32, 1, 4, 2)),
        (21, ProductCut(16, 32, 16, 4, 4, 3)),  # six steps in four splits
        (21, ProductCut(16, 32, 32, 2, 4, 2, span=16)),
        (70, ProductCut(64, 16, 16, 2, 4, 2, matrix_first=True)),
        (70, ProductCut(64, 64, 16, 1, 4, 2, matrix_first=True, span=32)),
    ],
)
def test_products_of_a_rank(rows: int, cut: ProductCut, dtype: torch.dtype, device: torch.device) -> None:
    inputs, outputs = 96, 64
    x = torch.randn((rows, inputs), device=device).to(dtype)
    matrix = (torch.randn((2 * outputs, inputs), device=device) * inputs**-0.5).to(dtype)
    scratch = ProductScratch(device, 2 * rows * outputs * cut.splits, 100)
    output = torch.empty((rows, outputs), dtype=dtype, device=device)
    product = x.double() @ matrix.double().T
    for _ in range(2):  # the second finds what the first left behind
        rank_product(x, matrix[outputs:], output, cut, scratch, pdl=False)
        close(output, product[:, outputs:])
    rank_product(x, matrix, output, replace(cut, splits=1), scratch, pdl=False, silu=True)
    close(output, F.silu(product[:, :outputs]) * product[:, outputs:])
    assert not scratch.arrived.any()
