"""The products of kernels/product.py in CUDA C++, for Hopper alone: a tile's splits are a cluster.

What that gains over Triton's: a step's boxes are brought by the card's copy engine with one instruction each, the
matrix's first ones before the kernel before this one has ended; splits add up through each other's shared memory, not
through the second-level cache and a counter; and with splits for free tiles are larger, so that less is read twice.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.driver import Kernel, TensorMap
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox

SOURCE = Path(__file__).with_suffix(".cu")
DEPTH = 64  # inputs a step, as in the source
INSTRUCTION_ROWS = 64  # of the matrix
MOST_CLUSTER = 8  # blocks
SHARED_MEMORY = 227 << 10


@dataclass(frozen=True)
class ClusterTiles:
    """How a product is cut. rows, a multiple of 8 up to 256, and outputs: of a tile; splits: of the inputs, the blocks
    of a cluster; stages: of 64 inputs, that a block has room for. span: outputs that a tile really has, where these are
    fewer; a multiple of 4."""

    rows: int
    outputs: int
    splits: int
    stages: int
    span: int = 0

    @property
    def width(self) -> int:
        return self.span or self.outputs

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a matrix [outputs, inputs] has whole tiles alone."""
        return outputs % self.width == 0 and inputs % (DEPTH * self.splits) == 0


@dataclass(frozen=True)
class ProductForm:
    """What a kernel is compiled for. ranks: that it sends to."""

    tiles: ClusterTiles
    outputs: int
    inputs: int
    parts: int
    add: bool
    silu: bool
    dtype: torch.dtype
    ranks: int = 0

    @property
    def matrix_rows(self) -> int:
        """Of a tile, those that it does not really have included."""
        return self.tiles.outputs * (2 if self.silu else 1)

    @property
    def ring(self) -> int:
        return min(self.tiles.stages, self.inputs // self.tiles.splits // DEPTH)

    @property
    def shared_bytes(self) -> int:
        rows = self.tiles.rows
        brought = -(-self.tiles.width // 8) * 8 * (2 if self.silu else 1)
        data = max(self.ring * (rows + brought) * DEPTH * 2, rows * (self.matrix_rows + 4) * 4)
        return data + 16 * self.ring + 4 * (rows // self.tiles.splits)

    def source(self) -> str:
        """What a kernel is compiled from."""
        tiles, half = self.tiles, self.dtype == torch.float16
        assert tiles.rows % 8 == tiles.rows % tiles.splits == 0
        assert self.matrix_rows % INSTRUCTION_ROWS == 0
        assert tiles.splits <= MOST_CLUSTER
        assert tiles.width % 4 == 0
        assert 0 <= tiles.outputs - tiles.width <= tiles.rows  # what is multiplied too lies in the block's memory
        assert tiles.width == tiles.outputs or not self.add  # a row's threads would be no power of two
        assert tiles.width == tiles.outputs or not self.silu or tiles.outputs % INSTRUCTION_ROWS == 0
        assert self.ranks == 0 or not (self.add or half)
        assert self.shared_bytes <= SHARED_MEMORY
        constants = {
            "ROWS": tiles.rows, "TILE": self.matrix_rows, "SPAN": tiles.width, "K": self.inputs, "N": self.outputs,
            "SPLITS": tiles.splits, "RING": self.ring, "PARTS": self.parts, "ADD": int(self.add),
            "SILU": int(self.silu), "HALF": int(half), "RANKS": self.ranks,
        }  # fmt: skip
        lines = [f"#define {name} {value}\n" for name, value in constants.items()]
        return "".join(lines) + _multiply(tiles.rows, "f16" if half else "bf16") + SOURCE.read_text()


def _multiply(rows: int, number: str) -> str:
    """The wgmma for so many rows of x; its sums are as many operands."""
    count = rows // 2
    places = ", ".join(f"%{place}" for place in range(count))
    sums = ", ".join(f'"+f"(sums[{place}])' for place in range(count))
    return (
        f"__device__ __forceinline__ void multiply(\n"
        f"    float (&sums)[{count}], unsigned long long matrix_box, unsigned long long x_box) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{number}.{number} {{{places}}}, '
        f'%{count}, %{count + 1}, 1, 1, 1, 0, 0;"\n    : {sums} : "l"(matrix_box), "l"(x_box));\n}}\n'
    )


@cache
def _kernel(form: ProductForm) -> Kernel:
    return Kernel(form.source(), "product", form.shared_bytes)


def cluster_product(
    x: Tensor,
    matrix: Tensor,
    output: Tensor,
    tiles: ClusterTiles,
    *,
    pdl: bool,
    squares: Tensor | None = None,
    eps: float = 0.0,
    addend: Tensor | None = None,
    gain: Tensor | None = None,
    gained: Tensor | None = None,
    new_squares: Tensor | None = None,
    silu: bool = False,
    outbox: Outbox | None = None,
) -> None:
    """As the products of kernels/product.py, whose names these are: of x and matrix in 16 bits, with or without each of
    their ends. outbox: as of `rank_product`."""
    rows, inputs = x.shape
    outputs, parts = output.shape[1], 0 if squares is None else squares.shape[1]
    assert matrix.shape == (outputs * (2 if silu else 1), inputs)
    assert tiles.fits(outputs, inputs)
    assert outbox is None or outbox.takes(output.numel(), output.dtype)
    form = ProductForm(
        tiles, outputs, inputs, parts, addend is not None, silu, x.dtype, 0 if outbox is None else len(outbox.regions)
    )
    sending = (None, None, 0, 0, 0) if outbox is None else (outbox.regions, outbox.calls, outbox.rank, *outbox.words)
    grid = outputs // tiles.width, triton.cdiv(rows, tiles.rows), tiles.splits
    _kernel(form)(
        (
            TensorMap(x, tiles.rows), TensorMap(matrix, tiles.width), squares, addend, gain, output, gained,
            new_squares, rows, eps, *sending,
        ), grid, form.matrix_rows * 2 + 32, (1, 1, tiles.splits), pdl=pdl,
    )  # fmt: skip
