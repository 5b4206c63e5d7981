"""The 8-bit KV cache in plain torch: how far codes are off, what becomes of NaN, and attention's error bound."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.qwen3.harness import compute_of, device_batch
from tests.runtime.settings.test_model_config import DENSE, read
from vibe_sgl_lite.model_worker.kv_int8 import dequantize, quantize
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

HEADS, KV_HEADS, DIM = 8, 2, 16  # of DENSE
CPU = torch.device("cpu")
# What is left between attention over the codes read back and the same in fp32: rounding of the model's dtype.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_element_is_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, 3, 64) * torch.logspace(-3, 3, 50).view(-1, 1, 1)).to(dtype)
    codes, scales = quantize(x)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, x.shape[:-1])
    torch.testing.assert_close(scales, x.float().abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert codes.abs().amax(-1).eq(127).all(), "the largest takes the last code"
    error = (dequantize(codes, scales, torch.float32) - x.float()).abs()
    assert (error <= scales.unsqueeze(-1) * 0.5001).all()


def test_zero_and_tiny_rows() -> None:
    x = torch.zeros(4, 16)
    x[1, 3] = 1e-45  # the smallest there is: its scale is 0
    x[2] = 1e-43
    x[3] = -1e-38
    codes, scales = quantize(x)
    back = dequantize(codes, scales, torch.float32)
    assert torch.equal(back[0], x[0])
    assert back.isfinite().all()
    torch.testing.assert_close(back, x, atol=1e-42, rtol=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """So that the row fails as it would with a cache of the model's dtype."""
    x = torch.ones(1, 16)
    x[0, 5] = bad
    codes, scales = quantize(x)
    assert not dequantize(codes, scales, torch.float32).isfinite().any()


class Rows:
    """Requests that run through one backend step by step, their pages handed out in scattered order.

    Norms have weight 1 and angles are 0, so that what attends is the normalised part of `qkv`.
    """

    def __init__(self, config: ModelConfig, backend: str, count: int, *, page_size: int, dtype: torch.dtype) -> None:
        self.pool = KVPool(config, 1, 200, page_size, dtype, CPU, int8=True)
        self.pool.data.fill_(-1)  # scales of NaN: whatever is read without having been written shows
        self.backend = compute_of(backend, dtype).attention(self.pool)
        self.norm = RMSNorm(DIM, 1e-6, dtype, CPU)
        self.norm.weight.install(torch.ones(DIM, dtype=dtype))
        self.free = np.random.default_rng(0).permutation(200).tolist()
        self.pages: list[list[int]] = [[] for _ in range(count)]
        self.lengths = [0] * count

    def slots(self, row: int, positions: range) -> list[int]:
        size = self.pool.page_size
        while len(self.pages[row]) * size < positions.stop:
            self.pages[row].append(self.free.pop())
        return [self.pages[row][p // size] * size + p % size for p in positions]

    def run(self, qkv: list[Tensor]) -> list[Tensor]:
        """Each row's new tokens, [n, HEADS + 2 KV_HEADS, DIM]. Returns their attention, [n, HEADS, DIM]."""
        counts = [len(tokens) for tokens in qkv]
        slots: list[int] = []
        for row, n in enumerate(counts):
            slots += self.slots(row, range(self.lengths[row], self.lengths[row] + n))
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        table = torch.full((len(qkv), max(map(len, self.pages))), self.pool.padding_page, dtype=torch.int32)
        for row, pages in enumerate(self.pages):
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        starts, lengths = np.cumsum([0, *counts], dtype=np.int32), np.array(self.lengths, dtype=np.int32)
        nothing = [0] * sum(counts)
        metadata = self.backend.prepare(device_batch(starts, lengths, table, slots, nothing, nothing))
        together = torch.cat(qkv).flatten(1)
        angles = RopeAngles(together.new_ones(sum(counts), DIM // 2), together.new_zeros(sum(counts), DIM // 2))
        out = self.backend.forward(1, together, self.norm, self.norm, angles, metadata)
        return list(torch.split(out.view(-1, HEADS, DIM), counts))

    def read_back(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values: [length, KV_HEADS, DIM] in fp32, and their scales, [length, KV_HEADS]."""
        slots = torch.tensor(self.slots(row, range(self.lengths[row])))
        page, place = slots // self.pool.page_size, slots % self.pool.page_size
        parts = []
        for codes, scales in (
            (self.pool.keys(1), self.pool.key_scales(1)),
            (self.pool.values(1), self.pool.value_scales(1)),
        ):
            assert scales is not None
            parts.append(
                (dequantize(codes[page, place], scales[page, :, place], torch.float32), scales[page, :, place])
            )
        return parts[0][0], parts[1][0], parts[0][1], parts[1][1]


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token, [HEADS, DIM], over [C, KV_HEADS, DIM], in fp32."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    weights = (torch.einsum("hd,chd->hc", query, keys) * DIM**-0.5).softmax(-1)
    return torch.einsum("hc,chd->hd", weights, values)


def bound(query: Tensor, exact: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor) -> Tensor:
    """How far the output may be off, [HEADS, 1], for elements off by half a scale each.

    A score is off by at most d = |query|_1 DIM^-0.5 max key scale / 2, so a weight by a factor of at most e^(2 d), and
    weights are of values' distances from the exact output; the values themselves are off by half their scale.
    """
    group = HEADS // KV_HEADS
    key_step, value_step = (x.amax(0).repeat_interleave(group) / 2 for x in (key_scales, value_scales))
    d = query.abs().sum(-1) * DIM**-0.5 * key_step
    spread = (values.repeat_interleave(group, 1) - exact).abs().amax((0, 2))
    return (torch.expm1(2 * d) * spread + value_step).unsqueeze(-1)


@pytest.mark.parametrize("backend", ["torch", "kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_attention_is_within_its_bound(tmp_path: Path, backend: str, dtype: torch.dtype, page_size: int) -> None:
    """Prefill, a chunk on top, decode: against exact attention, and closely against what the cache holds."""
    torch.manual_seed(page_size)
    rows = Rows(read(tmp_path, DENSE), backend, 3, page_size=page_size, dtype=dtype)
    seen: list[list[Tensor]] = [[], [], []]
    for counts in ((40, 1, 7), (20, 5, 1), (1, 1, 1), (1, 1, 1)):
        qkv = [torch.randn(n, HEADS + 2 * KV_HEADS, DIM).to(dtype) for n in counts]
        outputs = rows.run([tokens.clone() for tokens in qkv])
        for row, (tokens, output) in enumerate(zip(qkv, outputs, strict=True)):
            before = sum(map(len, seen[row]))
            normed = torch.nn.functional.rms_norm(tokens, (DIM,), eps=1e-6).float()
            seen[row].append(torch.cat((normed[:, HEADS:-KV_HEADS], tokens[:, -KV_HEADS:].float()), 1))
            every = torch.cat(seen[row])
            keys, values, key_scales, value_scales = rows.read_back(row)
            for token in range(len(tokens)):
                query, context = normed[token, :HEADS], before + token + 1
                exact = attend(query, every[:context, :KV_HEADS], every[:context, KV_HEADS:])
                cached = attend(query, keys[:context], values[:context])
                allowed = bound(query, exact, every[:context, KV_HEADS:], key_scales[:context], value_scales[:context])
                assert ((cached - exact).abs() <= allowed + 1e-6).all()
                torch.testing.assert_close(output[token].float(), cached, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
                assert (output[token].float() - exact).abs().amax() < 0.05
