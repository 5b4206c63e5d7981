"""The safetensors files of a model folder: which are read, and what their headers say. No torch: the launcher uses it.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length N, little endian; N bytes
of JSON, a tensor's name to its type, shape and range of bytes; then all tensors' bytes one after another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.schema import shown

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
MAX_NAME = 255  # bytes of a file's name
MAX_HEADER = 100_000_000  # bytes, the format's own limit
ITEM_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor in a file. name: in that file. dtype: as the format spells it. start, stop: bytes of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the files that make up the checkpoint in `folder`, by the name it has there.

    As transformers chooses them: model.safetensors, else the files that the index names, whatever it says of their
    tensors; without either, all *.safetensors. Where two files have a tensor, the index decides.

    Raises WeightsError naming the file: none or only pickles, an adapter, a missing, cut or malformed file, a file
    outside the folder, a tensor in two files.
    """
    adapter = next((name for name in ADAPTER_NAMES if (folder / name).exists()), None)
    if adapter is not None:
        raise WeightsError(
            f"{folder / adapter} belongs to an adapter, which is not applied: merge it into the weights, or remove it"
        )
    paths, index = _choose(folder)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_header(path):
            other = found.get(tensor.name)
            if other is None or index.get(tensor.name) == path.name:
                found[tensor.name] = tensor
            elif index.get(tensor.name) != other.path.name:
                raise WeightsError(
                    f"{folder}: both {other.path.name} and {path.name} have the tensor {tensor.name} and no "
                    f"{INDEX_NAME} says which one counts; remove the file that does not belong here"
                )
    return found


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that are read, in an order that depends on nothing but the folder. Raises WeightsError."""
    return _choose(folder)[0]


def unread_files(folder: Path) -> list[str]:
    """Names of safetensors files that lie in `folder` and are no part of its checkpoint."""
    used = {path.name for path in _choose(folder)[0]}
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises WeightsError naming it when it is cut short or malformed."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError("it ends within its header")
            entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        base = 8 + length
        tensors = [_entry(path, name, entry, base) for name, entry in entries.items() if name != "__metadata__"]
        end = base
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end:
                raise ValueError(f"the bytes of {tensor.name} do not follow those of the tensor before it")
            end = tensor.stop
        if end != size:
            raise ValueError(f"it has {size} bytes, its header tells of {end}")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {one_line(error)}; download it again") from error
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
        if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
            raise ValueError
        if (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its header's entry for {name!r} makes no sense: {str(entry)[:200]}") from error
    return StoredTensor(path, name, dtype, tuple(shape), base + start, base + stop)


def _choose(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files that are read, and the index where it is what chose them: tensors' names to files' names."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME], {}
    if (folder / INDEX_NAME).is_file():
        index = _read_index(folder / INDEX_NAME)
        paths = [folder / name for name in sorted(set(index.values()))]
        for path in paths:
            if not path.is_file():
                raise WeightsError(f"{path} is missing, but {INDEX_NAME} names it; download the shard again")
        return paths, index
    paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if paths:
        return paths, {}
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise WeightsError(
            f"{folder} has only {pickles[0]}, a pickle that could run code and is never read; "
            "convert the weights to *.safetensors"
        )
    raise WeightsError(f"{folder} has no *.safetensors file; download the weights, or run with --load-format dummy")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])["weight_map"]
        names = msgspec.convert(index, dict[str, str])
        if not names:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not a safetensors index with a weight_map: {one_line(error)}; download it again"
        ) from error
    for name in names.values():
        if Path(name).name != name or not name.isprintable() or len(name.encode()) > MAX_NAME:
            raise WeightsError(
                f"{path}: weight_map names {shown(name)!r}, which leads out of the model folder or is no file's name; "
                "download it again"
            )
    return names
