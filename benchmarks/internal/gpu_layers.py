r"""Which cuts of decode attention and of the products around it make whole layers fastest, where each kernel begins
while the one before it still runs.

    python benchmarks/internal/gpu_layers.py
    python benchmarks/internal/gpu_layers.py --rows 256,64 --only attention

28 layers of the 0.6B shape (hidden 1,024, inner 3,072, 16 heads on 8 KV heads of 128) in bf16 as `FusedLayers` runs
them, with weights and caches of their own in one graph; rows of 200 to 1,520 tokens in scattered pages of 64. First
cuts of attention are tried, then, with the best of them, others of each product, a few around those in use.
Microseconds a layer, the least of ten replays, beside what reading weights and caches takes at --read-gb-s.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_layers.py` finds the packages

from benchmarks.internal.gpu_kernels import DIM, HEADS, KV_HEADS, PAGE, SHARED_MEMORY, Decode  # noqa: E402
from benchmarks.internal.gpu_products import FAILURES, SHAPES, shown  # noqa: E402
from benchmarks.internal.gpu_timing import compile_beforehand, seconds  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.driver import has_clusters  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.fused_layers import (  # noqa: E402
    CLUSTERS,
    TILES,
    FusedLayers,
    LayerTiles,
    LayerWeights,
)
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (  # noqa: E402
    DecodeScratch,
    DecodeTiles,
    NewTokens,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.product import AnyTiles  # noqa: E402
from vibe_sgl_lite.qwen3.layers.part_timer import PartTimer  # noqa: E402

EPS, MOST_SPLITS = 1e-6, 16


@dataclass(frozen=True)
class Cuts:
    attention: DecodeTiles
    products: LayerTiles


def in_use(rows: int, *, clusters: bool) -> Cuts:
    most, products = next((most, cuts) for most, cuts in TILES if rows <= most)
    if clusters:
        products = replace(products, **CLUSTERS[most])
    return Cuts(choose_tiles(rows, KV_HEADS, torch.bfloat16, 1), products)


def attention_candidates(now: DecodeTiles) -> Iterator[DecodeTiles]:
    shapes = ((64, 4, 2), (64, 2, 2), (64, 4, 3), (128, 4, 2))
    for (keys, warps, stages), splits in itertools.product(shapes, (1, 2, 4, 8, 16)):
        if splits in (now.splits // 2, now.splits, now.splits * 2):
            yield DecodeTiles(keys, warps, stages, splits)


def cluster_candidates(name: str, now: ClusterTiles) -> Iterator[ClusterTiles]:
    outputs, inputs = SHAPES[name]
    two = 2 if name == "gate_up" else 1
    changes: tuple[dict[str, int], ...] = (
        {"stages": now.stages - 1}, {"stages": now.stages + 1}, {"stages": now.stages // 2},
        {"outputs": now.outputs // 2}, {"outputs": now.outputs * 2}, {"rows": now.rows // 2}, {"rows": now.rows * 2},
        {"splits": now.splits // 2}, {"splits": now.splits * 2},
        {"outputs": now.outputs * 2, "splits": now.splits * 2}, {"rows": now.rows * 2, "splits": now.splits * 2},
    )  # fmt: skip
    for change in changes:
        cut = replace(now, **change)
        memory = (cut.rows + cut.outputs * two) * 128 * cut.stages
        if cut.splits not in (1, 2, 4, 8) or cut.outputs * two % 64 or cut.stages < 2 or not 16 <= cut.rows <= 256:
            continue
        if memory <= SHARED_MEMORY and cut.rows % cut.splits == 0 and cut.fits(outputs, inputs):
            yield cut


def product_candidates(name: str, now: AnyTiles) -> Iterator[AnyTiles]:
    if isinstance(now, ClusterTiles):
        yield from cluster_candidates(name, now)
        return
    outputs, inputs = SHAPES[name]
    two = 2 if name == "gate_up" else 1
    changes: tuple[dict[str, int], ...] = (
        {"stages": now.stages - 2}, {"stages": now.stages - 1}, {"stages": now.stages + 1},
        {"inputs": now.inputs // 2}, {"inputs": now.inputs // 2, "stages": 2 * now.stages},
        {"outputs": now.outputs // 2}, {"outputs": now.outputs * 2}, {"rows": now.rows // 2}, {"rows": now.rows * 2},
        {"splits": now.splits // 2}, {"splits": now.splits * 2}, {"warps": 12 - now.warps},
    )  # fmt: skip
    for change in changes:
        cut = replace(now, **change)  # type: ignore[arg-type]
        memory = (cut.rows + cut.outputs * two) * cut.inputs * 2 * cut.stages
        if cut.splits < 1 or cut.outputs < 32 or cut.stages < 2 or cut.rows < 16 or memory > SHARED_MEMORY:
            continue
        if cut.fits(outputs, inputs) and not (two == 2 and cut.splits > 1):
            yield cut


class Layers:
    """All layers over `count` rows; its own attention is the engine's with cuts that may be set."""

    pdl = True

    def __init__(self, count: int, layers: int) -> None:
        self.rows = Decode(count, "bf16", layers)
        self.rows.scratch = DecodeScratch(KV_HEADS, HEADS // KV_HEADS, DIM, self.rows.query.device, count * MOST_SPLITS)
        made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}

        def norm(width: int) -> Any:
            return SimpleNamespace(weight=SimpleNamespace(tensor=torch.rand(width, **made) + 0.5), eps=EPS)

        def matrix(name: str) -> Any:
            outputs, inputs = SHAPES[name]
            return torch.randn((outputs * (2 if name == "gate_up" else 1), inputs), **made) * inputs**-0.5

        weights = [
            LayerWeights(*map(matrix, SHAPES), *map(norm, (1024, DIM, DIM, 1024)))
            for _ in range(layers)
        ]  # fmt: skip
        self.weights = weights
        lengths, table = self.rows.on_device.long(), self.rows.table.long()
        last = lengths - 1
        self.slots = table.gather(1, (last // PAGE)[:, None])[:, 0] * PAGE + last % PAGE
        angles = torch.rand((2, count, DIM // 2), **made)
        self.angles = SimpleNamespace(cos=angles[0], sin=angles[1])
        self.stream = torch.randn((count, 1024), **made)
        self.context: Any = SimpleNamespace(angles=self.angles, metadata=None, timer=PartTimer(), attention=self)
        self.read = sum(self.rows.lengths) * 4 * KV_HEADS * DIM + sum(
            matrix.numel() * 2
            for layer in weights[:1]
            for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )

    def use(self, cuts: Cuts) -> None:
        self.cuts = cuts
        self.fused = FusedLayers(self.weights, [(len(self.stream), cuts.products)], self)  # type: ignore[arg-type]

    def forward(self, layer: int, qkv: Any, query_norm: Any, key_norm: Any, angles: Any, metadata: Any) -> Any:
        rows, query = self.rows, qkv.new_empty((len(qkv), HEADS * DIM))
        norms = query_norm.weight.tensor, key_norm.weight.tensor, (EPS, EPS)
        decode_attention(
            qkv, rows.caches[layer], rows.table, rows.on_device, rows.order, rows.scratch, query,
            tiles=self.cuts.attention, pdl=True, new=NewTokens(*norms, angles.cos, angles.sin, self.slots),
        )  # fmt: skip
        return query

    def run(self) -> Any:
        return self.fused(self.stream.clone(), self.context)

    def microseconds(self, cuts: Cuts, expected: torch.Tensor | None) -> float:
        """Of a layer. expected: what comes out, nearly."""
        self.use(cuts)
        if expected is not None:
            off = float((self.run().float() - expected).norm() / expected.norm())
            if not off < 4e-2:  # other cuts of attention come to 0.022 after 28 layers in bf16
                raise ValueError(f"off by {off:.1e}")
        return seconds(lambda _: self.run(), 1) * 1e6 / len(self.weights)


def candidates(now: Cuts, only: str) -> Iterator[tuple[str, Cuts]]:
    if only in ("", "attention"):
        for attention in attention_candidates(now.attention):
            yield "attention", replace(now, attention=attention)
    for field in fields(LayerTiles):
        if only in ("", field.name):
            for cut in product_candidates(field.name, getattr(now.products, field.name)):
                yield field.name, replace(now, products=replace(now.products, **{field.name: cut}))


def compile_all(counts: list[int], only: str, jobs: int) -> None:
    made = cache(partial(Layers, layers=1))

    def compile_one(count: int, cuts: Cuts) -> None:
        made(count).use(cuts)
        made(count).run()

    compile_beforehand(
        {
            f"{count} {name} {cuts}": partial(compile_one, count, cuts)
            for count in counts for now in [in_use(count, clusters=True)]
            for name, cuts in [("now", now), ("Triton", in_use(count, clusters=False)), *candidates(now, only)]
        }, jobs,
    )  # fmt: skip


def with_part(cuts: Cuts, name: str, other: Cuts) -> Cuts:
    """`cuts` with the part of that name of `other`."""
    if name == "attention":
        return replace(cuts, attention=other.attention)
    return replace(cuts, products=replace(cuts.products, **{name: getattr(other.products, name)}))


def tune(count: int, num_layers: int, only: str, read_gb_s: float) -> None:
    layers, now = Layers(count, num_layers), in_use(count, clusters=has_clusters(torch.device("cuda", 0)))
    triton = in_use(count, clusters=False)
    layers.use(triton)
    expected = layers.run().float()
    took, best = [layers.microseconds(cuts, expected) for cuts in (now, triton) * 2], now
    print(
        f"{count:4} rows: {min(took[::2]):.1f} us a layer, in Triton alone {min(took[1::2]):.1f}, "
        f"floor {layers.read / read_gb_s / 1e3:.1f}",
        flush=True,
    )
    for name, group in itertools.groupby(candidates(now, only), lambda one: one[0]):
        results = []
        for _, cuts in group:
            tried = with_part(best, name, cuts)
            try:
                results.append((layers.microseconds(tried, expected), tried))
            except FAILURES as error:
                print(f"  {name} {part(tried, name)}: {error!r:.90}", file=sys.stderr)
        results.sort(key=lambda result: result[0])
        again = layers.microseconds(best, None)
        told = "; ".join(f"{us:.1f} {part(cuts, name)}" for us, cuts in results[:5])
        print(f"  {name}: as it is {again:.1f} {part(best, name)}; {told}", flush=True)
        if results and results[0][0] < again - 0.2:
            best = results[0][1]
    was, found = layers.microseconds(now, None), layers.microseconds(best, None)
    print(f"{count:4} rows: {was:.1f} as it was, {found:.1f} with {best}", flush=True)


def part(cuts: Cuts, name: str) -> str:
    if name != "attention":
        product = getattr(cuts.products, name)
        return str(product) if isinstance(product, ClusterTiles) else shown(product)
    cut = cuts.attention
    return f"({cut.keys}, {cut.warps}, {cut.stages}, {cut.splits})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,192,128,96,64,48,32,16")
    parser.add_argument("--only", default="", choices=("", "attention", *SHAPES))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--read-gb-s", type=float, default=3114.0)
    options = parser.parse_args()
    counts = [int(count) for count in options.rows.split(",")]
    compile_all(counts, options.only, options.jobs)
    print(torch.cuda.get_device_name(0), flush=True)
    for count in counts:
        tune(count, options.layers, options.only, options.read_gb_s)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
