"""Plain values of matrices that are published quantised (runtime/settings/quantized_form.py), a slice at a time.

A rank makes a slice plain, in fp32, and keeps it in whatever format its backend has. O outputs, I inputs, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vibe_sgl_lite.runtime.settings.quantized_form import AWQ, FP8, QuantizedForm

# AWQ's order of outputs within 32 bits: its kernels take even ones first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Read = Callable[..., Tensor]  # (suffix of a tensor's name, a slice a dimension) -> the tensor's part


def plain_slice(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Tensor:
    """[rows, columns] of the [O, I] matrix, fp32. read: of the tensors that stand for it."""
    if form.method == FP8:
        return _fp8(form, read, rows, columns)
    return _awq(form, read, rows, columns) if form.method == AWQ else _gptq(form, read, rows, columns)


def _fp8(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Tensor:
    """weight [O, I] e4m3 times weight_scale_inv, a scale for each block of `group` x `group`."""
    scales = read(".weight_scale_inv", _over(rows, form.group), _over(columns, form.group)).to(torch.float32)
    for dim, part in enumerate((rows, columns)):
        scales = scales.repeat_interleave(form.group, dim)
        scales = scales.narrow(dim, part.start % form.group, part.stop - part.start)
    return read(".weight", rows, columns).to(torch.float32) * scales


def _awq(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Tensor:
    """qweight [I, O / 8], qzeros [G, O / 8], scales [G, O]: (code - zero) x scale."""
    words, groups = _over(rows, 32 // form.bits), _over(columns, form.group)
    group_of = torch.arange(columns.start, columns.stop) // form.group - groups.start
    first = rows.start - words.start * (32 // form.bits)

    def codes(tensor: Tensor) -> Tensor:
        unpacked = _unpack(tensor, form.bits)[..., torch.tensor(AWQ_ORDER).argsort()]
        return unpacked.flatten(1)[:, first : first + rows.stop - rows.start]

    zeros = codes(read(".qzeros", groups, words))
    scales = read(".scales", groups, rows).to(torch.float32)
    return ((codes(read(".qweight", columns, words)) - zeros[group_of]) * scales[group_of]).t()


def _gptq(form: QuantizedForm, read: Read, rows: slice, columns: slice) -> Tensor:
    """qweight [I x bits / 32, O], qzeros [G, O x bits / 32], scales [G, O], g_idx [I]: an input's group."""
    packed = 32 // form.bits
    words, zero_words = _over(columns, packed), _over(rows, packed)
    codes = _unpack(read(".qweight", words, rows), form.bits).transpose(1, 2).flatten(0, 1)  # [I, O]
    codes = codes.narrow(0, columns.start - words.start * packed, columns.stop - columns.start)
    group_of = read(".g_idx", columns).to(torch.int64)
    zeros = _unpack(read(".qzeros", slice(None), zero_words), form.bits).flatten(1) + form.zero_offset
    zeros = zeros.narrow(1, rows.start - zero_words.start * packed, rows.stop - rows.start)
    scales = read(".scales", slice(None), rows).to(torch.float32)
    if int(group_of.min()) < 0 or int(group_of.max()) >= len(scales):
        raise ValueError(f"g_idx has groups beyond the {len(scales)} that have scales")
    return ((codes - zeros[group_of]) * scales[group_of]).t()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[..., n] int32 -> [..., n, 32 / bits] int32, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _over(part: slice, size: int) -> slice:
    """The pieces of `size` that `part` touches."""
    return slice(part.start // size, -(-part.stop // size))
