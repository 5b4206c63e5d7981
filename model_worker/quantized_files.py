"""Matrices that are published quantised (runtime/settings/quantized_form.py), a slice at a time: codes, scales.

A rank keeps them as they are where its backend can (`CodedFormat`), else makes them plain, in fp32, and keeps them in
whatever format it has. O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.matrix import CodedMatrix
from vibe_sgl_lite.runtime.settings.quantized_form import AWQ, FP8, QuantizedForm

# AWQ's order of outputs within 32 bits: its kernels take even ones first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Read = Callable[[str], Tensor]  # suffix of a tensor's name -> what `coded_parts` says of it


@dataclass(frozen=True)
class Codes:
    """A matrix [O, I] whose values are (codes - zeros) x scales, exactly.

    codes: [O, I], e4m3 or int32 from 0 to 2 ** bits - 1. scales: [O, G]. zeros: [O, G] int32; None of e4m3. group_of:
    [I] int64, an input's group. bits: of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor
    bits: int

    def plain(self) -> Tensor:
        """fp32."""
        codes = self.codes if self.zeros is None else self.codes - self.zeros[:, self.group_of]
        return codes.to(torch.float32) * self.scales[:, self.group_of].to(torch.float32)


@runtime_checkable
class CodedFormat(Protocol):
    """A `MatrixFormat` (qwen3/layers/matrix.py) that can also keep codes of so many bits as they are."""

    bits: int

    def of_codes(self, parts: Sequence[Codes]) -> CodedMatrix | None:
        """A matrix of parts with the same inputs, one's outputs below the other's; None of such as it cannot keep."""
        ...


def coded_parts(form: QuantizedForm, rows: slice, columns: slice) -> dict[str, tuple[slice, ...]]:
    """What [rows, columns] of an [O, I] matrix need of the tensors that stand for it, by the suffixes of their names.

    FP8: weight [O, I] e4m3, and weight_scale_inv, a scale for each block of `group` x `group`. AWQ: qweight [I, O / 8],
    qzeros [G, O / 8], scales [G, O]. GPTQ: qweight [I x bits / 32, O], qzeros [G, O x bits / 32], scales [G, O], g_idx
    [I], an input's group, which may be any.
    """
    groups = _over(columns, form.group)
    if form.method == FP8:
        return {".weight": (rows, columns), ".weight_scale_inv": (_over(rows, form.group), groups)}
    packed = 32 // form.bits
    if form.method == AWQ:
        words = _over(rows, packed)
        return {".qweight": (columns, words), ".qzeros": (groups, words), ".scales": (groups, rows)}
    return {
        ".qweight": (_over(columns, packed), rows),
        ".g_idx": (columns,),
        ".qzeros": (slice(None), _over(rows, packed)),
        ".scales": (slice(None), rows),
    }


def coded_slice(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Codes:
    """[rows, columns] of the [O, I] matrix, of which `read` gives `coded_parts`.

    Raises ValueError where these contradict each other.
    """
    if form.method == FP8:
        return _fp8(form, read, rows, columns)
    return _awq(form, read, rows, columns) if form.method == AWQ else _gptq(form, read, rows, columns)


def _fp8(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Codes:
    codes, scales = read(".weight"), read(".weight_scale_inv").to(torch.float32)
    scales = scales.repeat_interleave(form.group, 0).narrow(0, rows.start % form.group, rows.stop - rows.start)
    return Codes(codes, scales, None, _groups_of(columns, form, codes), 8)


def _awq(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Codes:
    """(code - zero) x scale."""
    first = rows.start % (32 // form.bits)

    def codes(tensor: Tensor) -> Tensor:
        unpacked = _unpack(tensor, form.bits)[..., torch.tensor(AWQ_ORDER).argsort()]
        return unpacked.flatten(1)[:, first : first + rows.stop - rows.start].t()

    matrix, zeros = codes(read(".qweight")), codes(read(".qzeros"))
    return Codes(matrix, read(".scales").t(), zeros, _groups_of(columns, form, matrix), form.bits)


def _gptq(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Codes:
    packed = 32 // form.bits
    codes = _unpack(read(".qweight"), form.bits).transpose(1, 2).flatten(0, 1)  # [I, O]
    codes = codes.narrow(0, columns.start % packed, columns.stop - columns.start)
    group_of = read(".g_idx").to(torch.int64)
    zeros = _unpack(read(".qzeros"), form.bits).flatten(1) + form.zero_offset
    zeros = zeros.narrow(1, rows.start % packed, rows.stop - rows.start)
    scales = read(".scales")
    if int(group_of.min()) < 0 or int(group_of.max()) >= len(scales):
        raise ValueError(f"g_idx has groups beyond the {len(scales)} that have scales")
    return Codes(codes.t(), scales.t(), zeros.t(), group_of, form.bits)


def _groups_of(columns: slice, form: QuantizedForm, like: Tensor) -> Tensor:
    """Of each input, counted from the first input's group."""
    groups = torch.arange(columns.start, columns.stop, device=like.device) // form.group
    return groups.sub_(columns.start // form.group)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[..., n] int32 -> [..., n, 32 / bits] int32, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _over(part: slice, size: int) -> slice:
    """The pieces of `size` that `part` touches."""
    return slice(part.start // size, -(-part.stop // size))
