"""Fills a model's weights, from safetensors files or, for `--load-format dummy`, from seeded random numbers. A model
that has weights takes the new ones in place.

Each rank reads only its own slices, a piece of a weight at a time, so the peak is what the rank keeps plus one weight,
or one piece where the weight's format takes such. Files are mapped for MAPPED_BYTES and unmapped again, which gives
their pages back. What comes next is read from the disk meanwhile (read_ahead.py).
"""

import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vibe_sgl_lite.model_worker.quantized_files import CodedFormat, Codes, coded_parts, coded_slice
from vibe_sgl_lite.model_worker.read_ahead import ReadAhead, Span
from vibe_sgl_lite.qwen3.checkpoint import LoadItem, Part, load_items
from vibe_sgl_lite.qwen3.layers.matrix import CodedMatrix, PlainMatrix, StackedMatrices
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixWeight
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.checkpoint import find_tensors
from vibe_sgl_lite.runtime.settings.quantized_form import QuantizedForm
from vibe_sgl_lite.runtime.settings.safetensors_files import ITEM_BITS, StoredTensor

# Dummy weights repeat a block of this many random numbers. A prime, so that no two rows of a matrix are the same.
DUMMY_BLOCK = 1_048_573
MAPPED_BYTES = 64 << 20
CPU = torch.device("cpu")
log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # weights done, weights in all


def load_weights(model: Qwen3, folder: str | Path, progress: Progress | None = None, *, finite: bool = False) -> None:
    """Fill every weight of `model` from the *.safetensors files of `folder`, one file or a sharded index.

    Raises WeightsError naming file and tensor (runtime/settings/checkpoint.py): before anything is filled, where the
    files' headers show it; and with `finite` for NaN and inf.
    """
    tensors, quantized = find_tensors(model.config, folder), model.config.quantized
    with ReadAhead(_spans(load_items(model), tensors, quantized)) as ahead:
        checkpoint = _Checkpoint(tensors, quantized, ahead, finite)
        _fill(model, checkpoint.read, CPU, progress, checkpoint.made)


def load_dummy_weights(model: Qwen3, seed: int, progress: Progress | None = None) -> None:
    """Fill `model` with random weights of the config's scale; norms are 1.

    They are made on the model's device, in seconds also for tens of gigabytes. A value depends on the seed, the
    tensor's name and its place in the whole tensor, so a model is the same at every tensor and expert parallel degree.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(DUMMY_BLOCK, generator=generator) * model.config.initializer_range
    source = _DummySource(block.to(model.dtype).to(model.device))
    _fill(model, source.read, model.device, progress)


def _fill(
    model: Qwen3,
    read: Callable[[Sequence[Part], Tensor], None],
    where: torch.device,
    progress: Progress | None,
    made: Callable[[LoadItem], CodedMatrix | StackedMatrices | None] = lambda item: None,
) -> None:
    """where: the device of the buffers that `read` fills. made: what an item is where it isn't made of one of these."""
    items = list(load_items(model))
    scratch = torch.empty(0, dtype=model.dtype, device=where)  # of pieces, whose values are taken and not it
    for done, item in enumerate(items):
        if progress is not None:
            progress(done, len(items))
        weight = item.weights[0]
        if (matrix := made(item)) is not None:
            if isinstance(matrix, CodedMatrix):
                assert isinstance(weight, MatrixWeight)
                weight.install_matrix(matrix)
            else:
                assert isinstance(weight, ExpertWeight)
                weight.install_stack(matrix)
            continue
        for taker in item.weights:
            for piece, parts in item.pieces(taker):
                shape = taker.shape_of(piece)
                if piece is None:
                    buffer = torch.empty(shape, dtype=taker.dtype, device=where)
                else:
                    size = math.prod(shape)
                    if scratch.numel() < size:
                        scratch = torch.empty(size, dtype=taker.dtype, device=where)
                    buffer = scratch[:size].view(shape)
                read(parts, buffer)
                taker.install(buffer.to(taker.device), piece)
    if progress is not None:
        progress(len(items), len(items))


class _Checkpoint:
    """Reads weights' parts from the safetensors files of one folder."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], quantized: QuantizedForm | None, ahead: ReadAhead, finite: bool
    ) -> None:
        self._tensors = tensors
        self._quantized = quantized
        self._ahead = ahead
        self._finite = finite
        self._opened: dict[Path, Any] = {}
        self._mapped_bytes = 0  # of which memory may be in use

    def read(self, parts: Sequence[Part], buffer: Tensor) -> None:
        """Copy every part into its place in `buffer`, converting to its dtype."""
        for part in parts:
            target = buffer[part.target]
            if self._is_quantized(part):
                target.copy_(self._codes(part, CPU).plain())
            else:
                assert self._tensors[part.name].shape == part.shape, part.name
                target.copy_(self._slice(part.name, part.source))
            self._check(part, target)

    def made(self, item: LoadItem) -> CodedMatrix | StackedMatrices | None:
        """What codes make; None where `item` is to be made of plain values."""
        weight = item.weights[0]
        if isinstance(weight, ExpertWeight) and weight.stack_format is not None:
            return self._stack(item, weight, weight.stack_format)
        return self._matrix(item)

    def _stack(self, item: LoadItem, weight: ExpertWeight, made: type[StackedMatrices]) -> StackedMatrices:
        """Of slices of whole blocks."""
        assert self._quantized is not None
        block = self._quantized.group
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty((weight.shape[0], *(side // block for side in weight.shape[1:])))
        for part in item.parts:
            values = self._slice(part.name, part.source)
            if bool(((values.view(torch.uint8) & 0x7F) == 0x7F).any()):
                raise WeightsError(
                    f"{part.name} has values that are no numbers; download the weights again", field=part.name
                )
            codes[part.target] = values
            factors = scales[part.target[0]]
            if len(part.target) > 1:
                rows = part.target[1]
                assert isinstance(rows, slice)
                factors = factors[_blocks(rows, block)]
            source = tuple(_blocks(side, block) for side in part.source)
            factors.copy_(self._slice(f"{part.name}_scale_inv", source))
            self._check(part, factors)
        return made(codes.to(weight.device), scales.to(weight.device))

    def _matrix(self, item: LoadItem) -> CodedMatrix | None:
        """The matrix of `item` made of its codes; None where it is to be made of plain values, or its codes cannot be
        kept: then its weight is to be as plain as they are, and no longer what it was to be."""
        weight = item.weights[0]
        if not isinstance(weight, MatrixWeight) or not isinstance(weight.format, CodedFormat):
            return None
        if not all(self._is_quantized(part) for part in item.parts):
            return None
        parts = [self._codes(part, weight.device) for part in item.parts]
        if any(part.bits != weight.format.bits for part in parts):
            return None
        for read, part in zip(parts, item.parts, strict=True):
            self._check(part, read.scales)
        with self._blame(item.parts[0]):
            matrix = weight.format.of_codes(parts)
            if matrix is None and weight.loaded:
                raise ValueError("groups of inputs are others than those of the weights before")
        if matrix is None:
            log.warning(
                "%s: a part of its groups of inputs, which cannot be kept in %d bits; it is kept plain",
                item.parts[0].name, weight.format.bits,
            )  # fmt: skip
            weight.keep_as(PlainMatrix)
        return matrix

    def _check(self, part: Part, values: Tensor) -> None:
        """Raises WeightsError for values that are no numbers, where that is looked for."""
        if self._finite and not torch.stack(torch.aminmax(values)).isfinite().all():  # these let a NaN through
            raise WeightsError(
                f"{part.name} has NaN or inf as {str(values.dtype).removeprefix('torch.')}: save numbers",
                field=part.name,
            )

    def _is_quantized(self, part: Part) -> bool:
        return self._quantized is not None and self._quantized.applies(part.name)

    def _codes(self, part: Part, where: torch.device) -> Codes:
        assert self._quantized is not None
        base = part.name.removesuffix(".weight")
        sources = coded_parts(self._quantized, *part.source)

        def read(suffix: str) -> Tensor:
            return self._slice(base + suffix, sources[suffix]).to(where)

        with self._blame(part):
            return coded_slice(self._quantized, read, *part.source)

    @contextmanager
    def _blame(self, part: Part) -> Iterator[None]:
        """Whatever contradicts itself is the fault of this part's file."""
        try:
            yield
        except ValueError as error:
            if isinstance(error, WeightsError):
                raise
            base = part.name.removesuffix(".weight")
            raise WeightsError(f"{base}: {error}; download the weights again", field=part.name) from error

    def _slice(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """A view of the mapped file."""
        stored = self._tensors[name]
        self._ahead.reached(name, _reach(stored, source)[1])
        try:
            if stored.path not in self._opened:
                self._opened[stored.path] = safe_open(stored.path, framework="pt")
            tensor: Tensor = self._opened[stored.path].get_slice(stored.name)[source]
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{stored.path} is not a whole safetensors file: {error}; download it again") from error
        self._mapped_bytes += tensor.nbytes
        if self._mapped_bytes > MAPPED_BYTES:
            self._opened.clear()
            self._mapped_bytes = 0
        return tensor


def _spans(
    items: Iterable[LoadItem], tensors: Mapping[str, StoredTensor], quantized: QuantizedForm | None
) -> dict[str, Span]:
    """What is read of each tensor, in the order in which it is."""
    spans: dict[str, Span] = {}
    for part in (part for item in items for part in item.parts):
        sources: Mapping[str, tuple[slice, ...]] = {part.name: part.source}
        if quantized is not None and quantized.applies(part.name):
            base = part.name.removesuffix(".weight")
            sources = {base + suffix: source for suffix, source in coded_parts(quantized, *part.source).items()}
        for name, source in sources.items():
            spans[name] = Span(tensors[name].path, *_reach(tensors[name], source))
    return spans


def _reach(stored: StoredTensor, source: Sequence[slice]) -> tuple[int, int]:
    """From the first to behind the last byte in its file of `source`, with what lies between."""
    size = ITEM_BITS[stored.dtype] // 8
    first = last = 0
    for part, length in zip(source, stored.shape, strict=True):
        start, stop, _ = part.indices(length)
        first, last = first * length + start, last * length + stop - 1
    return stored.start + first * size, stored.start + (last + 1) * size


def _blocks(part: slice, size: int) -> slice:
    return slice(part.start // size, part.stop // size)


class _DummySource:
    """Every checkpoint tensor as an endless repetition of one random block, begun at a place its name gives."""

    def __init__(self, block: Tensor) -> None:
        self.block = block

    def read(self, parts: Sequence[Part], buffer: Tensor) -> None:
        for part in parts:
            target = buffer[part.target]
            if len(part.shape) == 1:
                target.fill_(1.0)
                continue
            rows, columns = part.source
            width = part.shape[1]
            values = target if columns == slice(0, width) else target.new_empty((rows.stop - rows.start, width))
            self._repeat(part, rows.start * width, values.view(-1))
            if values is not target:
                target.copy_(values[:, columns])

    def _repeat(self, part: Part, first: int, values: Tensor) -> None:
        """Fill `values`, the elements from number `first` on of the whole tensor, row by row."""
        size = self.block.numel()
        start = (zlib.crc32(part.name.encode()) + first) % size
        for lower, upper in _pieces(start, values.numel(), size):
            values[lower:upper].copy_(self.block[(start + lower) % size :][: upper - lower])


def _pieces(start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of 0..count that each fall into one repetition of a block of `size` begun at `start`."""
    lower = 0
    while lower < count:
        upper = min(count, lower + size - (start + lower) % size)
        yield lower, upper
        lower = upper
