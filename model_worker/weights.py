"""Fills a model's weights, from safetensors files or, for `--load-format dummy`, from seeded random numbers.

Each rank reads only its own slices, one weight at a time into one buffer in its final layout, so the peak is what the
rank keeps plus one weight. Files are mapped for one weight and unmapped again, which gives their pages back.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vibe_sgl_lite.qwen3.checkpoint import LoadItem, Part, load_items
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
# Dummy weights repeat a block of this many random numbers. A prime, so that no two rows of a matrix are the same.
DUMMY_BLOCK = 1_048_573

Progress = Callable[[int, int], None]  # weights done, weights in all


def load_weights(model: Qwen3, folder: str | Path, progress: Progress | None = None) -> None:
    """Fill every weight of `model` from the *.safetensors files of `folder`, one file or a sharded index.

    Raises WeightsError naming file and tensor: no or only .bin weights, a missing or corrupt shard, a missing tensor,
    a wrong shape, a file that lies outside the folder.
    """
    checkpoint = _Checkpoint(Path(folder))
    _fill(model, checkpoint.read, progress)


def load_dummy_weights(model: Qwen3, seed: int, progress: Progress | None = None) -> None:
    """Fill `model` with random weights of the config's scale; norms are 1.

    A value depends on the seed, the tensor's name and its place in the whole tensor, so a model is the same at every
    tensor and expert parallel degree.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(DUMMY_BLOCK, generator=generator) * model.config.initializer_range
    source = _DummySource(block.to(model.dtype))
    _fill(model, source.read, progress)


def _fill(model: Qwen3, read: Callable[[LoadItem, Tensor], None], progress: Progress | None) -> None:
    items = list(load_items(model))
    for done, item in enumerate(items):
        if progress is not None:
            progress(done, len(items))
        weight = item.weights[0]
        buffer = torch.empty(weight.shape, dtype=weight.dtype)
        read(item, buffer)
        buffer = buffer.to(weight.device)
        for sharer in item.weights:
            sharer.install(buffer)
    if progress is not None:
        progress(len(items), len(items))


class _Checkpoint:
    """The safetensors files of one folder: which file has which tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = self._index()

    def read(self, item: LoadItem, buffer: Tensor) -> None:
        """Copy every part of `item` into its place in `buffer`, converting to its dtype."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for part in item.parts:
                path = self.file_of.get(part.name)
                if path is None:
                    raise WeightsError(
                        f"{self.folder}: no file has the tensor {part.name}; the checkpoint does not belong to this "
                        "config.json or is incomplete, download it again",
                        field=part.name,
                    )
                try:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = opened[path].get_slice(part.name)
                    shape = tuple(tensor.get_shape())
                    if shape != part.shape:
                        raise WeightsError(
                            f"{path}: {part.name} has shape {list(shape)}, config.json asks for {list(part.shape)}; "
                            "use the config.json that came with these weights",
                            field=part.name,
                        )
                    buffer[part.target].copy_(tensor[part.source])
                except (SafetensorError, OSError) as error:
                    raise _corrupt(path, error) from error

    def _index(self) -> dict[str, Path]:
        index_path = self.folder / INDEX_NAME
        if index_path.is_file():
            return self._read_index(index_path)
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            torch_files = sorted(path.name for path in self.folder.glob("*.bin"))
            if torch_files:
                raise WeightsError(
                    f"{self.folder} has only {torch_files[0]}, a pickle that could run code and is never read; "
                    "convert the weights to *.safetensors"
                )
            raise WeightsError(
                f"{self.folder} has no *.safetensors file; download the weights, or run with --load-format dummy"
            )
        file_of: dict[str, Path] = {}
        for path in paths:
            self._check_inside(path)
            for name in _tensor_names(path):
                if name in file_of:
                    raise WeightsError(
                        f"{self.folder}: both {file_of[name].name} and {path.name} have the tensor {name} and there is "
                        f"no {INDEX_NAME} to choose; remove the file that does not belong here"
                    )
                file_of[name] = path
        return file_of

    def _read_index(self, index_path: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index_path.read_bytes())["weight_map"]
            entries = [(str(name), str(file)) for name, file in weight_map.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{index_path} is not a safetensors index with a weight_map: {error!r}; download it again"
            ) from error
        file_of = {name: self.folder / file for name, file in entries}
        for path in sorted(set(file_of.values())):
            self._check_inside(path)
            if not path.is_file():
                raise WeightsError(f"{path} is missing, but {INDEX_NAME} names it; download the shard again")
            _tensor_names(path)  # a truncated shard is found now, not after minutes of loading
        return file_of

    def _check_inside(self, path: Path) -> None:
        """Refuse names and links that leave the model folder; a hub cache's links into its own blobs are its layout."""
        resolved = path.resolve()
        roots = [self.folder.resolve()]
        if self.folder.parent.name == "snapshots":
            roots.append(self.folder.parent.parent.resolve() / "blobs")
        if not any(resolved.is_relative_to(root) for root in roots):
            raise WeightsError(
                f"{path} leads out of the model folder, to {resolved}; put the file itself into {self.folder}"
            )


def _tensor_names(path: Path) -> Sequence[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is not a whole safetensors file: {error}; download it again")


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
