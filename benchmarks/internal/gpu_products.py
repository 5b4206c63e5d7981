r"""Which way to cut the products of a decode step is the fastest, for `TILES` of model_worker/gpu/fused_layers.py.

    python benchmarks/internal/gpu_products.py
    python benchmarks/internal/gpu_products.py --rows 256,128 --best 5

The four products of a layer at the 0.6B shape (hidden 1,024, inner 3,072, 16 heads on 8 KV heads of 128), in bf16, each
with what is folded into it, 28 layers with matrices of their own in one graph under programmatic dependent launch;
beside them `F.linear` with the kernels that it needs around it. Each cut is checked against fp32. Microseconds a layer.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.errors import TritonError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_products.py` finds the packages

from benchmarks.internal.gpu_timing import compile_beforehand, seconds  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.fused_layers import TILES  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm, silu_multiply  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.product import (  # noqa: E402
    ProductScratch,
    ProductTiles,
    added_product,
    normed_product,
)

LAYERS, EPS = 28, 1e-6
SHAPES = {"qkv": (4096, 1024), "output": (1024, 2048), "gate_up": (3072, 1024), "down": (1024, 3072)}  # outputs, inputs
SHARED_MEMORY = 215_000  # bytes that a program's stages may take
FAILURES = (TritonError, RuntimeError, ValueError)  # of a cut that the compiler or the card refuses, or that is wrong


def candidates(name: str, rows: int) -> Iterator[ProductTiles]:
    outputs, inputs = SHAPES[name]
    two = 2 if name == "gate_up" else 1
    heights = {16: (16, 64), 32: (32, 64), 64: (32, 64)}.get(rows, (64, 128))
    widths = (32, 64) if rows <= 32 else (32, 64, 128)
    depths = (64, 128, 256) if rows <= 64 else (64, 128)
    splits = {"qkv": (1, 2), "output": (1, 2, 4), "gate_up": (1,), "down": (1, 2, 3, 4, 6)}[name]
    for height, width, depth, parts in itertools.product(heights, widths, depths, splits):
        steps = inputs // parts // depth
        programs = -(-rows // height) * (outputs // width) * parts
        if inputs % (parts * depth) or steps < 2 or not 48 <= programs <= 400:
            continue
        for warps, stages, first in itertools.product((4, 8), (3, 4, 6), (False, True)):
            tile = height * width * two
            if (tile >= 128 * 128 and warps == 4) or (tile <= 32 * 64 and warps == 8) or (first and width < 64):
                continue
            if (height + width * two) * depth * 2 * stages > SHARED_MEMORY or not 3 < stages * depth // 64 < 13:
                continue
            yield ProductTiles(height, width, depth, parts, warps, stages, first)


class Case:
    """One product over `rows` rows, in each layer with another matrix."""

    def __init__(self, name: str, rows: int, layers: int = LAYERS) -> None:
        self.name, (self.outputs, self.inputs) = name, SHAPES[name]
        self.added, self.silu = name in ("output", "down"), name == "gate_up"
        device = torch.device("cuda")
        made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        wide = self.outputs * (2 if self.silu else 1)
        self.matrices = [torch.randn((wide, self.inputs), **made) * self.inputs**-0.5 for _ in range(layers)]
        self.x = torch.randn((rows, self.inputs), **made)
        self.stream, self.gained, self.output, self.addend = torch.randn((4, rows, self.outputs), **made)
        self.gain = torch.rand(self.outputs, **made) + 0.5
        self.squares = torch.zeros((rows, 16), device=device)
        self.squares[:, 0] = self.x.float().square().sum(1)
        self.new_squares = {parts: torch.zeros((rows, parts), device=device) for parts in (8, 16, 32)}
        self.scratch = ProductScratch(device, rows * 4096 * 6, 1 << 12)
        product = self.x.float() @ self.matrices[0].float().T
        if not self.added:
            product = product * torch.rsqrt(self.x.float().square().mean(1, keepdim=True) + EPS)
        if self.silu:
            product = F.silu(product[:, : self.outputs]) * product[:, self.outputs :]
        self.expected = product + self.addend.float() if self.added else product

    def run(self, tiles: ProductTiles, layer: int) -> None:
        matrix = self.matrices[layer]
        if self.added:
            squares = self.new_squares[self.outputs // tiles.outputs]
            added_product(
                self.x, matrix, self.stream, self.gain, self.gained, squares, tiles, self.scratch, pdl=True
            )  # fmt: skip
        else:
            normed_product(
                self.x, self.squares, EPS, matrix, self.output, tiles, self.scratch, pdl=True, silu=self.silu
            )  # fmt: skip

    def error(self, tiles: ProductTiles) -> float:
        for result in (self.stream, self.output, self.gained):
            result.fill_(float("nan"))
        if self.added:
            self.stream.copy_(self.addend)
        self.run(tiles, 0)
        got = self.stream if self.added else self.output
        return float((got.float() - self.expected).norm() / self.expected.norm())

    def plain(self, layer: int) -> None:
        product = F.linear(self.x, self.matrices[layer])
        if self.silu:
            silu_multiply(product, self.output, pdl=True)
        if self.added:
            add_rms_norm(product, self.stream, self.gain, EPS, self.gained, pdl=True)


def microseconds(work: Callable[[int], None]) -> float:
    """Of one layer."""
    return 1e6 * seconds(work, LAYERS)


def compile_all(rows: list[int], jobs: int) -> None:
    made = cache(partial(Case, layers=1))

    def compile_one(name: str, count: int, cut: ProductTiles) -> None:
        made(name, count).run(cut, 0)

    compile_beforehand(
        {
            f"{name} {count} {cut}": partial(compile_one, name, count, cut)
            for name in SHAPES for count in rows for cut in candidates(name, count)
        }, jobs,
    )  # fmt: skip


def shown(tiles: ProductTiles) -> str:
    cut = (tiles.rows, tiles.outputs, tiles.inputs, tiles.splits, tiles.warps, tiles.stages)
    return f"({', '.join(map(str, cut))}{', matrix_first=True' if tiles.matrix_first else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,128,64,32,16")
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    compile_all(rows, options.jobs)
    print(torch.cuda.get_device_name(0), flush=True)
    for count, name in itertools.product(rows, SHAPES):
        case, results, failed = Case(name, count), [], 0
        now = next(getattr(cuts, name) for most, cuts in TILES if count <= most)
        for tiles in {now, *candidates(name, count)}:
            try:
                if not case.error(tiles) < 1e-2:
                    raise ValueError(f"error {case.error(tiles):.1e}")
                results.append((microseconds(lambda layer: case.run(tiles, layer)), tiles))  # noqa: B023
            except FAILURES as error:
                failed += 1
                print(f"  {name} {count} {shown(tiles)}: {error!r:.90}", file=sys.stderr)
        results.sort(key=lambda result: result[0])
        best = "; ".join(f"{took:.2f} {shown(cut)}" for took, cut in results[: options.best])
        mine = next((took for took, cut in results if cut == now), float("nan"))
        wide = case.outputs * (2 if case.silu else 1)
        print(
            f"{count:4} {name:8} floor {wide * case.inputs * 2 / 3.13e6:.2f}, F.linear and around "
            f"{microseconds(case.plain):.2f}, now {mine:.2f}; of {len(results)}, {failed} failed: {best}",
            flush=True,
        )


if __name__ == "__main__":
    main()
