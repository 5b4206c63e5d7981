"""Formats in which a rank keeps a matrix: what each has to do, and torch's own ones.

On a CPU that has them, matrices are kept only in oneDNN's packed layout; the plain copy is dropped. In fp32, 16 rows
then take half the time of `F.linear`, and no row's result depends on how many others there are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN packs for an expected number of rows. Packed for 16, matrices were within noise of the best packing at each of
# 1 to 512 rows where AMX multiplies; without AMX, packing for 1 row loses up to 25 % at 16 and more.
PACKING_ROWS = 16


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has packed matrices of `dtype` on `device`."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(matrix: Tensor) -> Tensor:
    """[out, in] -> the same in oneDNN's layout, which only its own operations read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, PACKING_ROWS)
    return packed


class Matrix(Protocol):
    """An [out, in] matrix in some format. nbytes: of memory that it takes. keeps_rows: whether `rows` have all
    the bits that it was made of."""

    nbytes: int
    keeps_rows: bool

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in x's dtype."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, where it can give them: [n] int32 or int64 -> [n, in], of any dtype."""
        ...

    def refill(self, matrix: Tensor) -> None:
        """Take the values of another plain one of the same shape and dtype; programs and graphs of it stay valid."""
        ...


@runtime_checkable
class CodedMatrix(Matrix, Protocol):
    """One that can be made of a quantised checkpoint's own codes."""

    def take(self, other: Any) -> None:
        """`refill` from another one of this kind; ValueError where that is of another form."""
        ...


MatrixFormat = Callable[[Tensor], Matrix]  # makes one of a plain matrix, which the caller then drops


class GradualMatrix(Matrix, Protocol):
    def put(self, rows: slice, values: Tensor) -> None:
        """Take these rows, which the caller then uses for something else."""
        ...


@runtime_checkable
class GradualFormat(Protocol):
    """A `MatrixFormat` whose matrices can be filled a few rows at a time, so that the plain one is never there."""

    def bands(self, outputs: int, inputs: int) -> Sequence[slice]:
        """The rows to `put`, in this order."""
        ...

    def empty(self, outputs: int, inputs: int) -> GradualMatrix:
        """A matrix without values."""
        ...


class StackedMatrices(Protocol):
    """An [experts, out, in] stack of matrices, codes times a scale for each block. nbytes: of memory that it takes."""

    nbytes: int

    def __init__(self, codes: Tensor, scales: Tensor) -> None: ...

    @classmethod
    def of(cls, plain: Tensor) -> Self:
        """Of other numbers."""
        ...

    def plain(self, dtype: torch.dtype) -> Tensor:
        """[experts, out, in], widened."""
        ...

    def refill(self, plain: Tensor) -> None:
        """Take other values of the same shape; programs and graphs of it stay valid."""
        ...

    def take(self, other: Any) -> None:
        """The same, of another one of this kind."""
        ...


class PlainMatrix:
    """As it comes."""

    keeps_rows = True

    def __init__(self, matrix: Tensor) -> None:
        self.tensor = matrix
        self.nbytes = matrix.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tensor)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.tensor)

    def refill(self, matrix: Tensor) -> None:
        self.tensor.copy_(matrix)


class ProductOnly:
    """What formats have in common of which no row can be had again."""

    keeps_rows = False

    def rows(self, ids: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} keeps no rows")


class PackedMatrix(ProductOnly):
    """In oneDNN's layout."""

    def __init__(self, matrix: Tensor) -> None:
        self._packed = pack(matrix)
        self.nbytes = matrix.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """In fp32 a row's sums are in the same order for any number of rows but one, so one row is computed as two."""
        if x.shape[0] == 1 and x.dtype == torch.float32:
            return self.multiply(x.repeat(2, 1))[:1]
        output: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, None, "none", [], "")
        return output

    def refill(self, matrix: Tensor) -> None:
        self._packed = pack(matrix)  # nothing holds its address


def fastest_format(dtype: torch.dtype, device: torch.device) -> MatrixFormat:
    """The fastest one that keeps all bits of a matrix."""
    return PackedMatrix if can_pack(dtype, device) else PlainMatrix
