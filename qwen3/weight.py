"""Holders of one rank's weights: declared with a shape, filled once by the loader, kept in the fastest layout.

On a CPU that has them, matrices are kept only in oneDNN's packed layout; the plain copy is dropped. In bf16 the linears
of the 0.6B shape then take two thirds of the time of `F.linear` at 1 to 16 rows, which is the time of reading the
weights, and as much at 512. In fp32, 16 rows take half the time, and no row's result depends on how many others there
are.
"""

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
    """[out, in] -> the same in oneDNN's layout, which only `multiply_packed` reads."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, PACKING_ROWS)
    return packed


def multiply_packed(x: Tensor, packed: Tensor) -> Tensor:
    """[rows, in] -> [rows, out].

    In fp32 a row's sums are in the same order for any number of rows but one, so one row is computed as two.
    """
    if x.shape[0] == 1 and x.dtype == torch.float32:
        return multiply_packed(x.repeat(2, 1), packed)[:1]
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    return output


class Weight:
    """A tensor of `shape`, empty until `install`."""

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

    def install(self, tensor: Tensor) -> None:
        """Take ownership of `tensor`, of exactly this weight's shape, dtype and device."""
        self._check(tensor)
        self._tensor = tensor

    def _check(self, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self.shape, f"{tuple(tensor.shape)} installed into {self.shape}"
        assert tensor.dtype == self.dtype
        assert tensor.device == self.device


class MatrixWeight(Weight):
    """A linear layer's [out, in] matrix."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__((out_features, in_features), dtype, device)
        self._packed = can_pack(dtype, device)

    def install(self, tensor: Tensor) -> None:
        self._check(tensor)
        self._tensor = pack(tensor) if self._packed else tensor

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self._packed:
            return multiply_packed(x, self.tensor)
        return F.linear(x, self.tensor)


class ExpertWeight(Weight):
    """The matrices of this rank's experts, merged: [experts, out, in]."""

    def __init__(
        self, experts: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__((experts, out_features, in_features), dtype, device)
        self._packed = can_pack(dtype, device)
        self._matrices: list[Tensor] = []

    def install(self, tensor: Tensor) -> None:
        self._check(tensor)
        if self._packed:
            self._matrices = [pack(matrix) for matrix in tensor]
        else:
            self._tensor = tensor

    def multiply_grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` [experts] int64 of them for each: [rows, in] -> [rows, out].

        One matmul an expert that has rows on CPU; one grouped matmul for all of them on a GPU in bf16.
        """
        if x.device.type == "cuda" and x.dtype == torch.bfloat16:
            ends = counts.cumsum(0).to(torch.int32)
            grouped: Tensor = torch._grouped_mm(x, self.tensor.transpose(1, 2), offs=ends)
            return grouped
        output = x.new_empty((x.shape[0], self.shape[1]))
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            rows = x[start : start + count]
            if self._packed:
                output[start : start + count] = multiply_packed(rows, self._matrices[expert])
            else:
                torch.mm(rows, self.tensor[expert].T, out=output[start : start + count])
            start += count
        return output
