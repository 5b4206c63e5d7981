"""Holders of one rank's weights: declared with a shape, filled once by the loader, kept in the fastest layout.

Which layout that is may be said from outside (`keep_as`); matrix.py has the formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.matrix import (
    CodedMatrix,
    GradualFormat,
    Matrix,
    MatrixFormat,
    PlainMatrix,
    StackedMatrices,
    fastest_format,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix; expert: of whom, where there are several."""

    rows: slice
    expert: int | None = None


def _put(known: Matrix | None, form: MatrixFormat, rows: slice, values: Tensor, *size: int) -> Matrix:
    """The matrix [out, in] with these rows, which is made with the first of them."""
    assert isinstance(form, GradualFormat)
    matrix: Any = form.empty(*size) if known is None else known
    matrix.put(rows, values)
    return matrix


class Weight:
    """A tensor of `shape`, empty until all its `pieces` are installed."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The plain tensor; only after `install`."""
        assert self._tensor is not None, "weight used before it was loaded"
        return self._tensor

    def pieces(self) -> Sequence[Piece | None]:
        """What to install, in this order; None: all at once."""
        return (None,)

    def install(self, tensor: Tensor, piece: Piece | None = None) -> None:
        """Take ownership of `tensor`, of exactly this weight's shape, dtype and device. Where there is one already, and
        of pieces, take the values alone: programs and graphs hold the address."""
        assert piece is None
        self._check(tensor)
        if self._tensor is None:
            self._tensor = tensor
        else:
            self._tensor.copy_(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes once it is installed."""
        return self.tensor.nbytes

    def shape_of(self, piece: Piece | None) -> tuple[int, ...]:
        return self.shape if piece is None else (piece.rows.stop - piece.rows.start, self.shape[-1])

    def _check(self, tensor: Tensor, piece: Piece | None = None) -> None:
        assert tuple(tensor.shape) == self.shape_of(piece), f"{tuple(tensor.shape)} as {piece} of {self.shape}"
        assert tensor.dtype == self.dtype
        assert tensor.device == self.device


class MatrixWeight(Weight):
    """A linear layer's [out, in] matrix."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__((out_features, in_features), dtype, device)
        self.format = fastest_format(dtype, device)
        self._matrix: Matrix | None = None

    @property
    def tensor(self) -> Tensor:
        """The plain tensor; only after `install` and where that keeps it."""
        assert isinstance(self._matrix, PlainMatrix), "no plain matrix is kept"
        return self._matrix.tensor

    @property
    def loaded(self) -> bool:
        return self._matrix is not None

    @property
    def matrix(self) -> Matrix:
        """As it is kept; only after `install`."""
        assert self._matrix is not None, "weight used before it was loaded"
        return self._matrix

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def keep_as(self, matrix_format: MatrixFormat) -> None:
        """Choose what `install` makes of the matrix."""
        assert self._matrix is None
        self.format = matrix_format

    def pieces(self) -> Sequence[Piece | None]:
        if not isinstance(self.format, GradualFormat):
            return super().pieces()
        return [Piece(rows) for rows in self.format.bands(*self.shape)]

    def install(self, tensor: Tensor, piece: Piece | None = None) -> None:
        self._check(tensor, piece)
        if piece is not None:
            self._matrix = _put(self._matrix, self.format, piece.rows, tensor, *self.shape)
        elif self._matrix is None:
            self._matrix = self.format(tensor)
        else:
            self._matrix.refill(tensor)

    def install_matrix(self, matrix: CodedMatrix) -> None:
        """Take one that was made of something else than a plain one, in place of `install`."""
        if self._matrix is None:
            self._matrix = matrix
        else:
            assert isinstance(self._matrix, CodedMatrix)
            self._matrix.take(matrix)

    def replace(self, matrix: Matrix) -> None:
        """Keep it so from now on: another form of the same values."""
        self._matrix = matrix

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        return self.matrix.multiply(x)


class EmbeddingWeight(MatrixWeight):
    """A [vocab, hidden] matrix whose rows are looked up; plain, unless a format is chosen whose matrices can do that.

    tied: the head's weight, if that has the same values and is installed first. Where it can give rows with all bits,
    they are its own, and this one takes no memory.
    """

    def __init__(
        self, rows: int, width: int, dtype: torch.dtype, device: torch.device, tied: MatrixWeight | None
    ) -> None:
        super().__init__(rows, width, dtype, device)
        self.format = PlainMatrix
        self._tied = tied

    @property
    def tensor(self) -> Tensor:
        """The plain tensor; only after `install` and where there is one."""
        return super().tensor if self._lender is None else self._lender.tensor

    @property
    def nbytes(self) -> int:
        return 0 if self._lender is not None else super().nbytes

    def pieces(self) -> Sequence[Piece | None]:
        return super().pieces() if self._lender is None else ()

    def install(self, tensor: Tensor, piece: Piece | None = None) -> None:
        if self._lender is None:
            super().install(tensor, piece)

    def rows(self, ids: Tensor) -> Tensor:
        """[n] int32 or int64, each below the number of rows -> [n, hidden]."""
        return (self._lender or self).matrix.rows(ids).to(self.dtype)

    @property
    def _lender(self) -> MatrixWeight | None:
        return self._tied if self._tied is not None and self._tied.matrix.keeps_rows else None


class ExpertWeight(Weight):
    """The matrices of this rank's experts, merged: [experts, out, in]. stack: all of them in a format of their own."""

    def __init__(
        self, experts: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__((experts, out_features, in_features), dtype, device)
        self._format = fastest_format(dtype, device)
        self._matrices: list[Matrix] = []
        self.stack_format: type[StackedMatrices] | None = None
        self.stack: StackedMatrices | None = None

    def keep_as(self, matrix_format: MatrixFormat) -> None:
        """Choose what `install` makes of each expert's matrix."""
        assert not self._matrices
        self._format = matrix_format

    def install_stack(self, stack: StackedMatrices) -> None:
        """In place of `install`, what was made of something else than plain matrices."""
        if self.stack is None:
            self.stack = stack
        else:
            self.stack.take(stack)

    def pieces(self) -> Sequence[Piece | None]:
        if self.stack_format is not None or not isinstance(self._format, GradualFormat):
            return super().pieces()
        experts, outputs, inputs = self.shape
        return [Piece(rows, expert) for expert in range(experts) for rows in self._format.bands(outputs, inputs)]

    def install(self, tensor: Tensor, piece: Piece | None = None) -> None:
        self._check(tensor, piece)
        if piece is not None:
            assert piece.expert is not None
            place = slice(piece.expert, piece.expert + 1)
            known = next(iter(self._matrices[place]), None)
            self._matrices[place] = [_put(known, self._format, piece.rows, tensor, *self.shape[1:])]
            return
        if self.stack is not None:
            self.stack.refill(tensor)
            return
        if self.stack_format is not None:
            self.stack = self.stack_format.of(tensor)
            return
        if self._matrices:
            for kept, matrix in zip(self._matrices, tensor, strict=True):
                kept.refill(matrix)
            return
        self._matrices = [self._format(matrix) for matrix in tensor]
        if self._format is PlainMatrix:
            self._tensor = tensor  # which the matrices are views of

    @property
    def matrices(self) -> Sequence[Matrix]:
        """Each expert's, as it is kept; only after `install`."""
        return self._matrices

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices) if self.stack is None else self.stack.nbytes

    def multiply_grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` [experts] int64 of them for each: [rows, in] -> [rows, out].

        One matmul an expert that has rows on CPU; one grouped matmul for all of them on a GPU in bf16.
        """
        if x.device.type == "cuda" and x.dtype == torch.bfloat16:
            ends = counts.cumsum(0).to(torch.int32)
            tensor = self.tensor if self.stack is None else self.stack.plain(x.dtype)
            grouped: Tensor = torch._grouped_mm(x, tensor.transpose(1, 2), offs=ends)
            return grouped
        matrices = self._matrices
        if self.stack is not None:
            matrices = [PlainMatrix(matrix) for matrix in self.stack.plain(x.dtype)]
        output = x.new_empty((x.shape[0], self.shape[1]))
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            rows = slice(start, start + count)
            output[rows] = matrices[expert].multiply(x[rows])
            start += count
        return output
