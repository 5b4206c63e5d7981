r"""How fast the attention kernels of a GPU are alone, at the 0.6B shape (16 heads on 8 KV heads of 128), pages of 64.

    python benchmarks/internal/gpu_kernels.py

Decode rows of about 860 tokens, over a cache in bf16, fp8 and int8: microseconds a layer, and the rate at which keys
and values are read. Chunks: TFLOP/s, causal pairs alone counted, with both ways to cut a launch. Each layer has a cache
of its own, so that none is found in L2. Prints a line each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_kernels.py` finds the packages

from benchmarks.internal.gpu_timing import seconds  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (  # noqa: E402
    DecodeScratch,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.prefill_attention import (  # noqa: E402
    FEW_TOKENS,
    choose_prefill_tiles,
    plan_tiles,
    prefill_attention,
)

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 16, 8, 128, 64, 28


def caches(pages: int, layers: int, kind: str) -> list[LayerCache]:
    shape = (pages, PAGE, KV_HEADS, DIM)
    made = []
    for _ in range(layers):
        if kind != "bf16":
            codes = torch.randint(0, 120, (2, *shape), dtype=torch.int8, device="cuda")
            scales = torch.rand((2, pages, KV_HEADS, PAGE), device="cuda") / 100
            made.append(LayerCache.of_codes(*codes, *scales, integers=kind == "int8"))
        else:
            values = torch.randn((2, *shape), device="cuda", dtype=torch.bfloat16)
            made.append(LayerCache(values[0], values[1]))
    return made


def tables(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
    """Scattered pages: [rows, pages] and [rows] int32; and how many there are."""
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    for row, part in enumerate(torch.split(order, counts)):
        table[row, : len(part)] = part
    return table.cuda(), torch.tensor(lengths, dtype=torch.int32).cuda(), sum(counts)


def decode(rows: int, kind: str) -> None:
    lengths = np.random.default_rng(0).integers(200, 1520, rows).tolist()
    table, on_device, pages = tables(lengths)
    cache = caches(pages, LAYERS, kind)
    query = torch.randn((rows, HEADS * DIM), device="cuda", dtype=torch.bfloat16)
    output = torch.empty_like(query)
    scratch = DecodeScratch(KV_HEADS, HEADS // KV_HEADS, DIM, query.device)
    order = on_device.argsort(descending=True).to(torch.int32)
    tiles = choose_tiles(rows, KV_HEADS, torch.bfloat16 if kind == "bf16" else torch.int8, max(lengths))
    took = seconds(
        lambda layer: decode_attention(
            query, cache[layer], table, on_device, order, scratch, output, tiles=tiles, pdl=True
        ),
        LAYERS,
    )
    read = sum(lengths) * 2 * KV_HEADS * (2 * DIM if kind == "bf16" else DIM + 4)
    print(f"decode {rows} rows {kind}: {took * 1e6:.1f} us, {read / took / 1e9:.0f} GB/s", flush=True)


def chunks(count: int, new: int, before: int, kind: str) -> None:
    """`count` rows with `new` tokens each after `before` others."""
    table, on_device, pages = tables([before + new] * count)
    layers = 4
    cache = caches(pages, layers, kind)
    query = torch.randn((count * new, HEADS * DIM), device="cuda", dtype=torch.bfloat16)
    output = torch.empty_like(query)
    fresh = None
    if kind != "bf16":
        fresh = torch.randn((count * new, (HEADS + 2 * KV_HEADS) * DIM), device="cuda", dtype=torch.bfloat16)
    starts = np.arange(count + 1, dtype=np.int32) * new
    start = torch.from_numpy(starts).cuda()
    for tokens in (1, FEW_TOKENS + 1):
        dtype = torch.bfloat16 if kind == "bf16" else torch.int8
        cut = choose_prefill_tiles(tokens, HEADS // KV_HEADS, dtype)
        planned = plan_tiles(starts, np.arange(count, dtype=np.int32), cut.rows // (HEADS // KV_HEADS))
        tiles = torch.from_numpy(planned).cuda()

        def work(layer: int) -> None:
            rows = query, cache[layer], table, on_device, start
            prefill_attention(*rows, tiles, cut, output, pdl=True, fresh=fresh)  # noqa: B023

        took = seconds(work, layers)
        pairs = count * (new * before + new * (new + 1) // 2)
        name = f"{count} x {new} after {before} {kind}, tiles of {cut.rows}"
        print(f"chunks {name}: {took * 1e6:.0f} us, {4 * HEADS * DIM * pairs / took / 1e12:.0f} TFLOP/s", flush=True)


def main() -> None:
    print(torch.cuda.get_device_name(0), flush=True)
    for rows in (256, 64):
        for kind in ("bf16", "fp8", "int8"):
            decode(rows, kind)
    for count, new, before in ((28, 640, 0), (1, 16_384, 0), (1, 2_048, 8_192)):
        chunks(count, new, before, "bf16")
    for kind in ("fp8", "int8"):
        chunks(28, 640, 0, kind)
        chunks(1, 2_048, 8_192, kind)


if __name__ == "__main__":
    main()
