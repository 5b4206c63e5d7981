r"""How fast the attention kernels of a GPU are alone, at the 0.6B shape (16 heads on 8 KV heads of 128), pages of 64.

    python benchmarks/internal/gpu_kernels.py
    python benchmarks/internal/gpu_kernels.py --tune 64,128          ways to cut a launch of decode rows, the best first

Decode rows of about 860 tokens, over a cache in bf16, fp8 and int8: microseconds a layer, and the rate at which keys
and values are read. Chunks: TFLOP/s, causal pairs alone counted, with both ways to cut a launch. Each layer has a cache
of its own, so that none is found in L2. Prints a line each.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_kernels.py` finds the packages

from benchmarks.internal.gpu_timing import compile_beforehand, seconds  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (  # noqa: E402
    DecodeScratch,
    DecodeTiles,
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
MOST_SPLITS = 4  # that are tried
SHARED_MEMORY = 215_000  # bytes that a program's stages may take


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


class Decode:
    """Rows that decode, in each layer over another cache."""

    def __init__(self, rows: int, kind: str, layers: int = LAYERS) -> None:
        self.rows, self.kind = rows, kind
        self.lengths = np.random.default_rng(0).integers(200, 1520, rows).tolist()
        self.table, self.on_device, pages = tables(self.lengths)
        self.caches = caches(pages, layers, kind)
        self.query = torch.randn((rows, HEADS * DIM), device="cuda", dtype=torch.bfloat16)
        self.output = torch.empty_like(self.query)
        self.scratch = DecodeScratch(KV_HEADS, HEADS // KV_HEADS, DIM, self.query.device, places=rows * MOST_SPLITS)
        self.order = self.on_device.argsort(descending=True).to(torch.int32)
        self.tiles = choose_tiles(rows, KV_HEADS, torch.bfloat16 if kind == "bf16" else torch.int8, max(self.lengths))

    def run(self, tiles: DecodeTiles, layer: int) -> None:
        decode_attention(
            self.query, self.caches[layer], self.table, self.on_device, self.order, self.scratch, self.output,
            tiles=tiles, pdl=True,
        )  # fmt: skip

    def measure(self, tiles: DecodeTiles) -> str:
        took = seconds(lambda layer: self.run(tiles, layer), LAYERS)
        read = sum(self.lengths) * 2 * KV_HEADS * (2 * DIM if self.kind == "bf16" else DIM + 4)
        return f"{took * 1e6:7.1f} us, {read / took / 1e9:.0f} GB/s"


def candidates(kind: str) -> Iterator[DecodeTiles]:
    for keys, warps, stages, splits in itertools.product((64, 128), (2, 4), (2, 3, 5), (1, 2, 4)):
        if keys * stages * DIM * (4 if kind == "bf16" else 2) < SHARED_MEMORY:
            yield DecodeTiles(keys, warps, stages, splits)


def tune(counts: list[int], kind: str) -> None:
    few = cache(partial(Decode, 8, kind, 1))
    compile_beforehand({str(cut): partial(lambda cut: few().run(cut, 0), cut) for cut in candidates(kind)}, 14)
    for rows in counts:
        made = Decode(rows, kind)
        made.run(made.tiles, 0)
        expected = made.output.clone()
        print(f"decode {rows} rows {kind}: {made.measure(made.tiles)} with {made.tiles}", flush=True)
        results = []
        for cut in candidates(kind):
            made.output.fill_(float("nan"))
            made.run(cut, 0)
            assert torch.allclose(made.output.float(), expected.float(), atol=2e-2), cut
            results.append((made.measure(cut), cut))
        for took, cut in sorted(results, key=lambda result: result[0])[:5]:
            print(f"    {took} {cut}", flush=True)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", default="", metavar="ROWS", help="numbers of decode rows, with commas")
    parser.add_argument("--kv-cache-dtype", default="bf16", choices=("bf16", "fp8", "int8"), help="to tune for (bf16)")
    options = parser.parse_args()
    if options.tune:
        tune([int(count) for count in options.tune.split(",")], options.kv_cache_dtype)
        return
    print(torch.cuda.get_device_name(0), flush=True)
    for rows in (256, 64):
        for kind in ("bf16", "fp8", "int8"):
            made = Decode(rows, kind)
            print(f"decode {rows} rows {kind}: {made.measure(made.tiles)}", flush=True)
    for count, new, before in ((28, 640, 0), (1, 16_384, 0), (1, 2_048, 8_192)):
        chunks(count, new, before, "bf16")
    for kind in ("fp8", "int8"):
        chunks(28, 640, 0, kind)
        chunks(1, 2_048, 8_192, kind)


if __name__ == "__main__":
    main()
