r"""Which way to cut a rank's products is the fastest, for `choose_cut` of model_worker/gpu/rank_products.py.

    python benchmarks/internal/rank_products.py --shapes 32B/2,8B/2 --rows 64,16,128

A layer's four products for one of so many ranks, in bf16, each behind a norm, in graphs over several matrices so that
none stays in the cache; beside them `F.linear` with what it needs around it. Microseconds, the norm's taken off; each
cut is checked against fp32. Last, whole layers (without attention and sums) by the best cuts and by cuBLAS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/rank_products.py` finds the packages

from benchmarks.gpu_offline import measure_card  # noqa: E402
from benchmarks.internal.gpu_timing import compile_beforehand, seconds  # noqa: E402
from benchmarks.parallel_gpu import SHAPES  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm, silu_multiply  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import ProductCut, rank_product  # noqa: E402

NAMES = ("qkv", "output", "gate_up", "down")
MATRICES = 4
CUTS = {  # by rows: of a block, outputs, inputs a step, warps, stages, matrix first
    16: [
        (16, 64, 128, 4, 6, True), (16, 64, 256, 4, 4, True), (16, 128, 128, 4, 5, True), (16, 128, 64, 4, 6, True),
        (16, 128, 128, 8, 5, True), (16, 32, 256, 4, 4, False),
        (16, 32, 128, 4, 5, False),
    ],
    64: [
        (64, 64, 128, 4, 3, False), (64, 64, 128, 4, 4, True), (64, 64, 128, 4, 6, True),
        (64, 64, 64, 4, 6, False), (64, 128, 64, 4, 4, False),
        (64, 128, 64, 4, 4, True), (64, 128, 64, 4, 8, False), (64, 128, 128, 8, 4, False), (64, 128, 128, 8, 4, True),
        (64, 256, 64, 8, 5, False), (64, 256, 64, 8, 5, True), (64, 64, 64, 4, 6, True), (64, 32, 128, 4, 4, False),
    ],
    128: [
        (128, 64, 64, 4, 4, False), (128, 128, 64, 8, 3, False), (128, 128, 64, 8, 6, False),
        (64, 128, 64, 4, 4, False), (128, 64, 128, 8, 4, False), (128, 128, 64, 8, 6, True),
        (128, 256, 64, 8, 4, False),
    ],
}  # fmt: skip


def sides(name: str, shape: dict[str, Any], ranks: int) -> tuple[int, int]:
    """Outputs, without up's, and inputs."""
    heads, kv_heads, dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    inner, hidden = shape["intermediate_size"] // ranks, shape["hidden_size"]
    return {
        "qkv": ((heads + 2 * kv_heads) * dim // ranks, hidden), "output": (hidden, heads * dim // ranks),
        "gate_up": (inner, hidden), "down": (hidden, inner),
    }[name]  # fmt: skip


def candidates(name: str, rows: int, outputs: int, inputs: int) -> Iterator[ProductCut]:
    silu = name == "gate_up"
    for height, width, depth, warps, stages, first in CUTS[min(CUTS, key=lambda most: (most < rows, most))]:
        width = width // 2 if silu and width > 32 else width
        memory = (height + width * (2 if silu else 1)) * depth * 2 * stages
        if outputs % width or inputs % depth or memory > 227_000 or (first and width < 64):
            continue
        blocks = outputs // width
        spans = [outputs // count for count in range(132, blocks, -1) if outputs % count == 0]
        if silu and spans and spans[0] > width // 2:
            yield ProductCut(height, width, depth, 1, warps, stages, first, span=spans[0])
        for splits in sorted({max(1, 132 * places // blocks) for places in (1, 2, 3)}):
            if splits == 1 or inputs // depth // splits >= 4:
                yield ProductCut(height, width, depth, splits, warps, stages, first)


class Case:
    def __init__(self, name: str, rows: int, outputs: int, inputs: int, matrices: int = MATRICES) -> None:
        self.name, self.silu = name, name == "gate_up"
        made: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
        wide = outputs * (2 if self.silu else 1)
        self.matrices = [torch.randn((wide, inputs), **made) * inputs**-0.5 for _ in range(matrices)]
        self.update, self.residual, self.x = torch.randn((3, rows, inputs), **made)
        self.given = self.x.clone()
        self.gain, self.output = torch.ones(inputs, **made), torch.empty((rows, outputs), **made)
        self.scratch = ProductScratch(made["device"], max(rows, 64) * wide * 16, 1 << 12)
        product = self.x.float() @ self.matrices[0].float().T
        self.expected = F.silu(product[:, :outputs]) * product[:, outputs:] if self.silu else product

    def norm(self) -> None:
        add_rms_norm(self.update, self.residual, self.gain, 1e-6, self.x, pdl=True)

    def ours(self, cut: ProductCut, number: int) -> None:
        rank_product(self.x, self.matrices[number], self.output, cut, self.scratch, pdl=True, silu=self.silu)

    def plain(self, number: int) -> None:
        product = F.linear(self.x, self.matrices[number])
        if self.silu:
            silu_multiply(product, self.output, pdl=True)

    def error(self, cut: ProductCut) -> float:
        self.output.fill_(float("nan"))
        self.x.copy_(self.given)
        self.ours(cut, 0)
        return float((self.output.float() - self.expected).norm() / self.expected.norm())


def microseconds(work: Callable[[int], Any], count: int) -> float:
    return 1e6 * seconds(work, count)


def behind_norm(case: Case, work: Callable[[int], Any]) -> float:
    def both(number: int) -> None:
        case.norm()
        work(number % MATRICES)

    return microseconds(both, 2 * MATRICES)


def compile_all(work: list[tuple[str, int, ProductCut]], jobs: int) -> None:
    distinct = {(name == "gate_up", replace(cut, splits=1)): name for name, _, cut in work}

    def compile_one(name: str, cut: ProductCut) -> None:
        case = Case(name, cut.rows, cut.width, 8 * cut.inputs, 1)
        case.ours(cut, 0)
        case.norm()

    compile_beforehand(
        {f"{name} {cut}": partial(compile_one, name, cut) for (_, cut), name in distinct.items()}, jobs
    )  # fmt: skip


def shown(cut: ProductCut) -> str:
    return str(astuple(cut)).replace("True", "T").replace("False", "F").replace(" ", "")


def measure(shape: str, ranks: int, rows: int, read_gb_s: float, best: int) -> None:
    chosen: dict[str, tuple[Case, ProductCut]] = {}
    for name in NAMES:
        outputs, inputs = sides(name, SHAPES[shape], ranks)
        case = Case(name, rows, outputs, inputs)
        norm = microseconds(lambda _, case=case: case.norm(), 16)  # type: ignore[misc]
        results, failed = [], 0
        for cut in candidates(name, rows, outputs, inputs):
            try:
                assert case.error(cut) < 1e-2, case.error(cut)
                for early in (0, 4, 16):
                    each = replace(cut, early=min(early, inputs // cut.splits // 64))
                    results.append((behind_norm(case, partial(case.ours, each)) - norm, each))
            except Exception as error:  # noqa: BLE001
                failed += 1
                print(f"  {shape}/{ranks} {name} {shown(cut)}: {error!r:.120}", file=sys.stderr)
        results.sort(key=lambda result: result[0])
        plain = behind_norm(case, case.plain) - norm
        floor = case.matrices[0].nbytes / read_gb_s / 1e3
        ends = "; ".join(f"{took:.1f} {shown(cut)}" for took, cut in results[:best])
        unaided = next((took, cut) for took, cut in results if not cut.early)
        print(
            f"{shape}/{ranks} {rows:3} {name:8} floor {floor:.1f} cuBLAS {plain:.1f} | {ends} | early 0: "
            f"{unaided[0]:.1f} {shown(unaided[1])} | {len(results)}, {failed} failed", flush=True,
        )  # fmt: skip
        chosen[name] = case, results[0][1]

    def layer(number: int, *, ours: bool) -> None:
        for name, (case, cut) in chosen.items():
            if name in ("qkv", "gate_up"):
                case.norm()
            if ours:
                case.ours(cut, number % MATRICES)
            else:
                case.plain(number % MATRICES)

    layers = [microseconds(partial(layer, ours=ours), 2 * MATRICES) for ours in (True, False)]
    print(f"{shape}/{ranks} {rows} layer: ours {layers[0]:.1f} cuBLAS {layers[1]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="32B/2,8B/2,4B/2", help="shape/ranks")
    parser.add_argument("--rows", default="64,16,128")
    parser.add_argument("--best", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    shapes = [(shape, int(ranks)) for shape, ranks in (each.split("/") for each in options.shapes.split(","))]
    work = [
        (name, count, cut) for shape, ranks in shapes for count in rows for name in NAMES
        for cut in candidates(name, count, *sides(name, SHAPES[shape], ranks))
    ]  # fmt: skip
    compile_all(work, options.jobs)
    card = measure_card()
    print(torch.cuda.get_device_name(0), card, flush=True)
    for count in rows:
        for shape, ranks in shapes:
            measure(shape, ranks, count, card["read_gb_s"], options.best)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
