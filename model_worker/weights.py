"""Fills a model's weights, from safetensors files or, for `--load-format dummy`, from seeded random numbers. A model
that has weights takes the new ones in place.

Each rank reads only its own slices, one weight at a time into one buffer in its final layout, so the peak is what the
rank keeps plus one weight. Files are mapped for one weight and unmapped again, which gives their pages back.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vibe_sgl_lite.model_worker.quantized_files import plain_slice
from vibe_sgl_lite.qwen3.checkpoint import LoadItem, Part, load_items
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.checkpoint import find_tensors
from vibe_sgl_lite.runtime.settings.quantized_form import QuantizedForm
from vibe_sgl_lite.runtime.settings.safetensors_files import StoredTensor

# Dummy weights repeat a block of this many random numbers. A prime, so that no two rows of a matrix are the same.
DUMMY_BLOCK = 1_048_573
CPU = torch.device("cpu")

Progress = Callable[[int, int], None]  # weights done, weights in all


def load_weights(model: Qwen3, folder: str | Path, progress: Progress | None = None, *, finite: bool = False) -> None:
    """Fill every weight of `model` from the *.safetensors files of `folder`, one file or a sharded index.

    Raises WeightsError naming file and tensor (runtime/settings/checkpoint.py): before anything is filled, where the
    files' headers show it; and with `finite` for NaN and inf.
    """
    tensors = find_tensors(model.config, folder)
    _fill(model, _Checkpoint(tensors, model.config.quantized, finite).read, CPU, progress)


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
    model: Qwen3, read: Callable[[LoadItem, Tensor], None], where: torch.device, progress: Progress | None
) -> None:
    """where: the device of the buffers that `read` fills."""
    items = list(load_items(model))
    for done, item in enumerate(items):
        if progress is not None:
            progress(done, len(items))
        weight = item.weights[0]
        buffer = torch.empty(weight.shape, dtype=weight.dtype, device=where)
        read(item, buffer)
        buffer = buffer.to(weight.device)
        for sharer in item.weights:
            sharer.install(buffer)
    if progress is not None:
        progress(len(items), len(items))


class _Checkpoint:
    """Reads weights' parts from the safetensors files of one folder."""

    def __init__(self, tensors: Mapping[str, StoredTensor], quantized: QuantizedForm | None, finite: bool) -> None:
        self._tensors = tensors
        self._quantized = quantized
        self._finite = finite

    def read(self, item: LoadItem, buffer: Tensor) -> None:
        """Copy every part of `item` into its place in `buffer`, converting to its dtype."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(name: str, *source: slice) -> Tensor:
                stored = self._tensors[name]
                try:
                    if stored.path not in opened:
                        opened[stored.path] = stack.enter_context(safe_open(stored.path, framework="pt"))
                    tensor: Tensor = opened[stored.path].get_slice(stored.name)[source]
                except (SafetensorError, OSError) as error:
                    raise WeightsError(
                        f"{stored.path} is not a whole safetensors file: {error}; download it again"
                    ) from error
                return tensor

            for part in item.parts:
                target = buffer[part.target]
                target.copy_(self._part(part, read))
                if self._finite and not torch.stack(torch.aminmax(target)).isfinite().all():  # these let a NaN through
                    raise WeightsError(
                        f"{part.name} has NaN or inf as {str(buffer.dtype).removeprefix('torch.')}: save numbers",
                        field=part.name,
                    )

    def _part(self, part: Part, read: Callable[..., Tensor]) -> Tensor:
        if self._quantized is None or not self._quantized.applies(part.name):
            assert self._tensors[part.name].shape == part.shape, part.name
            return read(part.name, *part.source)
        base = part.name.removesuffix(".weight")
        try:
            return plain_slice(self._quantized, lambda suffix, *source: read(base + suffix, *source), *part.source)
        except ValueError as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{base}: {error}; download the weights again", field=part.name) from error


class _DummySource:
    """Every checkpoint tensor as an endless repetition of one random block, begun at a place its name gives."""

    def __init__(self, block: Tensor) -> None:
        self.block = block

    def read(self, item: LoadItem, buffer: Tensor) -> None:
        for part in item.parts:
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
