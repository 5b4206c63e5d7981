"""Matrices of a quantised checkpoint, or of 4 bits because they are asked for, as their codes on a GPU.

Products of few rows unpack the codes as they go (kernels/grouped_product.py). With more rows e4m3 goes through the
card's fp8 units, with rows in e4m3 too and a scale for each 128 inputs of them, which is what such checkpoints are made
for; 4 bits go on as they are, and with many rows the matrix is made plain for the time of the product. O outputs, I
inputs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.fp8_product import encode_groups
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_gemv import GemvTiles, grouped_gemv, takes_rows
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import (
    GroupedCodes,
    GroupedTiles,
    grouped_product,
    plain_matrix,
)
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.model_worker.quantized_files import Codes
from vibe_sgl_lite.qwen3.layers.matrix import ProductOnly

WHOLE_OUTPUTS = 128  # which outputs are filled up to: the largest tile's
GROUPS = (256, 128, 64, 32, 16)  # inputs that may share a scale; the most planes are of half a line of the cache
LEAST_PLANE, MOST_PLANE = 16, 64
MOST_UNITS = 32  # that a program has at once
SPLIT_UNITS = 8  # the same where programs share the inputs
CHUNKS, MOST_FILLED = (32, 16, 8), 4 / 3  # units of one that has more; what they may be with what fills them up
FEW_OUTPUTS = 4224  # two tiles a multiprocessor
MANY_OUTPUTS, SHARERS = 8192, 528  # as gate and up have; programs that share so many
GROUP = 128  # of what is quantised here
SUMS, ARRIVED = 1 << 23, 1 << 12  # what splits may need
PROGRAMS, LEAST_UNITS = 800, 2  # of a product that is split: about so many, each with so much to do
WHOLE_ROWS = 16  # of the card's fp8 product by blocks
FEW_ROWS = 16  # up to which rows of x keep their bits beside e4m3
MOST_ROWS = 256  # up to which codes are unpacked as they are multiplied
FP8_MOST = 448.0


def choose_tiles(rows: int, outputs: int, units: int) -> GroupedTiles:
    """For a matrix of so many outputs and units of inputs; measured on an H100 at the 8B shape."""
    if rows <= 16:
        tiles = GroupedTiles(max(8, triton.next_power_of_2(rows)), 64, 1, 2 if rows <= 8 else 4, 4)
    elif rows <= 64:
        tiles = GroupedTiles(triton.next_power_of_2(rows), 128, 1, 8, 3)
    else:
        tiles = GroupedTiles(128, 128, 1, 8, 2)
    programs = triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outputs)
    wanted = PROGRAMS if rows <= 16 else PROGRAMS // 4
    return replace(tiles, splits=max(1, min(-(-wanted // programs), units // LEAST_UNITS)))


def choose_gemv(outputs: int, units: int, bits: int) -> GemvTiles:
    """The same for one row; measured on an H100 at the 8B shape, of 4 bits and many inputs at that of 4B, too."""
    if units > MOST_UNITS:
        if outputs <= MANY_OUTPUTS:
            return GemvTiles(SPLIT_UNITS, 4, splits=-(-units // SPLIT_UNITS))
        sizes = CHUNKS if bits == 4 else CHUNKS[1:]
        size = next((size for size in sizes if -(-units // size) * size <= MOST_FILLED * units), sizes[-1])
        return GemvTiles(size, 4 if bits == 4 else 8)
    whole = max(8, triton.next_power_of_2(units))
    if outputs > MANY_OUTPUTS:
        return GemvTiles(whole, 4) if bits == 4 else GemvTiles(whole, 8, SHARERS, 80, 2)
    return GemvTiles(whole, 8, registers=0 if outputs <= FEW_OUTPUTS else 80 if bits == 4 else 128)


class GroupedMatrix(ProductOnly):
    """One of them. scratch: shared by all of a model. remake: makes one of plain values. blocks: of e4m3, [O / 128,
    I / 128] fp32, where each 128 outputs have the same scales, too."""

    def __init__(
        self, codes: GroupedCodes, scratch: ProductScratch, remake: "GroupedFormat", blocks: Tensor | None
    ) -> None:
        self.codes, self.scratch, self.blocks = codes, scratch, blocks
        self._remake = remake
        self.nbytes = codes.nbytes + (0 if blocks is None else blocks.nbytes)
        self.pdl = has_dependent_launch(codes.words.device)
        self.gemv = choose_gemv(codes.outputs, codes.units, codes.bits)

    def tiles(self, rows: int) -> GroupedTiles:
        return choose_tiles(rows, self.codes.outputs, self.codes.units)

    def refill(self, matrix: Tensor) -> None:
        self.take(self._remake(matrix))

    def take(self, other: "GroupedMatrix") -> None:
        if self._form() != other._form():
            raise ValueError("groups of inputs are others than those of the weights before")
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> list[Tensor]:
        parts = (self.codes.words, self.codes.scales, self.codes.order, self.blocks)
        return [part for part in parts if part is not None]

    def _form(self) -> object:
        """What kernels were launched for."""
        codes = self.codes
        return codes.plane, codes.group, codes.order is None, self.blocks is None

    def multiply(self, x: Tensor) -> Tensor:
        if self.blocks is not None and len(x) > FEW_ROWS and x.dtype == torch.bfloat16:
            return self._multiply_fp8(x.contiguous(), self.blocks)
        if len(x) > MOST_ROWS:
            return F.linear(x, plain_matrix(self.codes, x.dtype, pdl=self.pdl))
        output = x.new_empty((len(x), self.codes.outputs))
        if takes_rows(x):
            grouped_gemv(x.contiguous(), self.codes, output, self.gemv, self.scratch, pdl=self.pdl)
        else:
            grouped_product(x.contiguous(), self.codes, output, self.tiles(len(x)), self.scratch, pdl=self.pdl)
        return output

    def _multiply_fp8(self, x: Tensor, blocks: Tensor) -> Tensor:
        groups = blocks.shape[1]
        rows = -(-len(x) // WHOLE_ROWS) * WHOLE_ROWS  # what fills them up is in no other row's result
        codes = torch.empty((rows, groups * GROUP), dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty((groups, rows), dtype=torch.float32, device=x.device)
        encode_groups(x, codes, scales, pdl=self.pdl)
        matrix = self.codes.words.view(torch.float8_e4m3fn)
        product: Tensor = torch._scaled_mm(
            codes, matrix.t(), scale_a=scales.t(), scale_b=blocks.t(), out_dtype=x.dtype
        )  # fmt: skip
        return product[: len(x), : self.codes.outputs].contiguous()


class GroupedFormat:
    """A `CodedFormat` (model_worker/quantized_files.py). bits: 4, or 8 for e4m3."""

    def __init__(self, bits: int, device: torch.device) -> None:
        assert bits in (4, 8)
        self.bits = bits
        self._scratch = ProductScratch(device, SUMS, ARRIVED)

    def __call__(self, matrix: Tensor) -> GroupedMatrix:
        """Quantise: 4 bits by groups of inputs, e4m3 by blocks of `GROUP` x `GROUP`."""
        made = self.of_codes([_codes4(matrix) if self.bits == 4 else _codes8(matrix)])
        assert made is not None
        return made

    def of_codes(self, parts: Sequence[Codes]) -> GroupedMatrix | None:
        """None where groups of inputs are not the same in all parts, or not whole, as in a part of a matrix whose
        groups are in another order than its inputs.

        Raises ValueError for codes that are no numbers.
        """
        order, group_of = None, parts[0].group_of
        if any(not torch.equal(part.group_of, group_of) for part in parts):
            return None
        codes = torch.cat([part.codes.view(torch.uint8) if self.bits == 8 else part.codes for part in parts])
        scales = torch.cat([part.scales for part in parts])
        if self.bits == 8 and bool(((codes & 0x7F) == 0x7F).any()):
            raise ValueError("weight has values that are no numbers")
        if bool((group_of.diff() < 0).any()):
            order = group_of.argsort(stable=True)
            codes, group_of = codes[:, order], group_of[order]
        outputs, inputs = codes.shape
        places = 16 // self.bits
        group = next((size for size in GROUPS if size <= MOST_PLANE * places and _shared(group_of, size)), None)
        if group is None:
            return None
        plane = max(LEAST_PLANE, group // places)  # so that a unit is a group, if it can
        fill = -outputs % WHOLE_OUTPUTS, -inputs % (plane * places)
        codes = F.pad(codes.to(torch.int32), (0, fill[1], 0, fill[0]))
        units = codes.view(len(codes), -1, places, plane)
        words = sum(units[:, :, place] << (place * self.bits) for place in range(places))
        assert isinstance(words, Tensor)
        groups = group_of[::group]
        made = scales[:, groups].to(torch.float32)
        if self.bits == 4:
            zeros = torch.cat([part.zeros for part in parts if part.zeros is not None])[:, groups]
            made = (made.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF) | zeros.to(torch.int32) << 16
        made = F.pad(made, (0, (len(units[0]) * places * plane) // group - made.shape[1], 0, fill[0]))
        words = words.to(torch.int16)
        if self.bits == 4:
            words = words.view(-1, 8, *words.shape[1:]).transpose(1, 2).reshape(words.shape)
        kept = GroupedCodes(
            words.flatten(1).contiguous(), made.view(-1, 8, made.shape[1]).transpose(1, 2).contiguous(),
            None if order is None else order.to(torch.int32), outputs, inputs, self.bits, plane, group,
        )  # fmt: skip
        return GroupedMatrix(kept, self._scratch, self, _blocks(kept) if words.is_cuda and self.bits == 8 else None)


def _blocks(kept: GroupedCodes) -> Tensor | None:
    """None where the card's product cannot have them."""
    scales = kept.scales.transpose(1, 2).reshape(len(kept.words) // GROUP, GROUP, -1)
    last = kept.outputs % GROUP or GROUP  # what fills up the last block has scales of zero
    same = torch.equal(scales[:-1], scales[:-1, :1].expand_as(scales[:-1]))
    same = same and torch.equal(scales[-1, :last], scales[-1, :1].expand_as(scales[-1, :last]))
    takes = kept.group == GROUP and kept.order is None and scales.shape[2] % 4 == 0
    return scales[:, 0].contiguous() if same and takes else None


def _shared(group_of: Tensor, size: int) -> bool:
    """Whether every `size` inputs are of one group."""
    whole = F.pad(group_of[None], (0, -len(group_of) % size), mode="replicate")[0].view(-1, size)
    return bool((whole == whole[:, :1]).all())


def _codes4(matrix: Tensor) -> Codes:
    """From the least value of a group to its largest in 15 steps, zero being one of them."""
    outputs, inputs = matrix.shape
    values = F.pad(matrix.float(), (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    low, high = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    scales = ((high - low) / 15).clamp_min(1e-7).to(torch.float16)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (values / scales.float()[..., None]).round().add_(zeros[..., None]).clamp_(0, 15)
    group_of = torch.arange(inputs, device=matrix.device) // GROUP
    return Codes(codes.flatten(1)[:, :inputs].to(torch.int32), scales, zeros.to(torch.int32), group_of, 4)


def _codes8(matrix: Tensor) -> Codes:
    outputs, inputs = matrix.shape
    values = F.pad(matrix.float(), (0, -inputs % GROUP, 0, -outputs % GROUP))
    blocks = values.view(len(values) // GROUP, GROUP, -1, GROUP)
    scales = (blocks.abs().amax((1, 3)) / FP8_MOST).clamp_min(1e-12)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(values.shape)[:outputs, :inputs]
    group_of = torch.arange(inputs, device=matrix.device) // GROUP
    return Codes(codes.contiguous(), scales.repeat_interleave(GROUP, 0)[:outputs], None, group_of, 8)
