r"""Which way to cut products of codes is the fastest, for `choose_gemv` of model_worker/gpu/grouped_matrix.py.

    python benchmarks/internal/gpu_grouped.py --model-path qwen3-8b
    python benchmarks/internal/gpu_grouped.py --model-path qwen3-8b --bits 8 --best 5

The four products of one row in a layer with what is folded into them, each layer with matrices of its own in one graph
under programmatic dependent launch. Each cut is checked against fp32. Microseconds a product, and the share of the rate
at which 3,113 GB/s would read its bytes; 36 layers of one product behind each other, so none has another's memory to
use.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_grouped.py` finds the packages

from benchmarks.internal.gpu_products import EPS, FAILURES  # noqa: E402
from benchmarks.internal.gpu_timing import compile_beforehand, seconds  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.grouped_matrix import GroupedFormat, GroupedMatrix  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_gemv import GEMV_OUTPUTS, GemvTiles, grouped_gemv  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import plain_matrix  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402

RATE = 3.113e12
LAYERS = 36
CANDIDATES = tuple(
    GemvTiles(*cut)
    for cut in (
        (32, 4), (32, 4, 0, 128), (32, 8), (32, 8, 0, 64), (32, 8, 0, 80), (32, 8, 0, 128), (32, 8, 0, 128, 2),
        (16, 8), (16, 8, 0, 64), (8, 8, 0, 64, 4), (32, 8, 264, 64, 2), (32, 8, 264, 128), (32, 8, 528, 64, 2),
        (16, 4, 0, 0, 3, 6), (16, 4, 0, 80, 3, 6), (16, 8, 0, 64, 3, 6), (32, 4, 0, 0, 3, 3), (32, 8, 0, 80, 3, 3),
    )
)  # fmt: skip


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs, inputs."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    return {
        "qkv": ((heads + 2 * kv_heads) * config.head_dim, hidden),
        "output": (hidden, heads * config.head_dim),
        "gate_up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }


def candidates(name: str) -> list[GemvTiles]:
    """Those whose programs take one tile each, for products that are added."""
    return [cut for cut in CANDIDATES if not (cut.programs and name in ("output", "down"))]


class Case:
    """One product, in each layer with another matrix."""

    def __init__(self, name: str, outputs: int, inputs: int, bits: int, layers: int) -> None:
        self.added, self.silu = name in ("output", "down"), name == "gate_up"
        device = torch.device("cuda")
        made = {"device": device, "dtype": torch.bfloat16}
        wide = outputs * (2 if self.silu else 1)
        plain = torch.randn((wide, inputs), **made) * inputs**-0.5  # type: ignore[call-overload]
        first = GroupedFormat(bits, device)(plain)
        self.matrices = [first, *(self._copy(first) for _ in range(layers - 1))]
        self.x = torch.randn((1, inputs), **made)  # type: ignore[call-overload]
        self.stream, self.gained, self.addend = torch.randn((3, 1, outputs), **made)  # type: ignore[call-overload]
        self.gain = torch.rand(outputs, **made) + 0.5  # type: ignore[call-overload]
        self.squares = torch.zeros((1, inputs // 16), device=device)
        self.squares[:, 0] = self.x.float().square().sum(1)
        product = self.x.float() @ plain_matrix(first.codes, torch.float32, pdl=False).T
        if not self.added:
            product = product * torch.rsqrt(self.x.float().square().mean(1, keepdim=True) + EPS)
        if self.silu:
            product = F.silu(product[:, :outputs]) * product[:, outputs:]
        self.expected = product + self.addend.float() if self.added else product

    @staticmethod
    def _copy(matrix: GroupedMatrix) -> GroupedMatrix:
        codes = replace(matrix.codes, words=matrix.codes.words.clone(), scales=matrix.codes.scales.clone())
        return GroupedMatrix(codes, matrix.scratch, GroupedFormat(codes.bits, codes.words.device), None)

    def run(self, tiles: GemvTiles, layer: int) -> None:
        codes, scratch = self.matrices[layer].codes, self.matrices[layer].scratch
        if self.added:
            parts = self.squares.new_empty((1, -(-self.stream.shape[1] // GEMV_OUTPUTS)))
            grouped_gemv(
                self.x, codes, self.stream, tiles, scratch, pdl=True, gain=self.gain, gained=self.gained,
                new_squares=parts,
            )  # fmt: skip
        else:
            grouped_gemv(
                self.x, codes, self.stream, tiles, scratch, pdl=True, squares=self.squares, eps=EPS, silu=self.silu
            )  # fmt: skip

    def error(self, tiles: GemvTiles) -> float:
        self.stream.copy_(self.addend)
        self.run(tiles, 0)
        return float((self.stream.float() - self.expected).norm() / self.expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--best", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    options = parser.parse_args()
    sides, bits = shapes(ModelConfig.from_folder(options.model_path)), options.bits
    made = cache(lambda name: Case(name, *sides[name], bits, 1))
    compile_beforehand(
        {
            f"{name} {tiles}": partial(lambda name, tiles: made(name).run(tiles, 0), name, tiles)
            for name in sides for tiles in candidates(name)
        }, options.jobs,
    )  # fmt: skip
    for name, (outputs, inputs) in sides.items():
        case, results = Case(name, outputs, inputs, bits, LAYERS), []
        now = case.matrices[0].gemv
        for tiles in {now, *candidates(name)}:
            try:
                if not (error := case.error(tiles)) < 1e-2:
                    raise ValueError(f"error {error:.1e}")
                results.append((1e6 * seconds(partial(case.run, tiles), LAYERS), tiles))
            except FAILURES as error:
                print(f"  {name} {tiles}: {error!r:.90}", file=sys.stderr)
        results.sort(key=lambda result: result[0])
        floor = case.matrices[0].nbytes / RATE * 1e6
        mine = next((took for took, tiles in results if tiles == now), float("nan"))
        best = "; ".join(f"{took:.2f} ({floor / took:.0%}) {astuple(tiles)}" for took, tiles in results[: options.best])
        print(f"{bits} bits, {name:8} floor {floor:.2f}, now {mine:.2f}; {best}", flush=True)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
