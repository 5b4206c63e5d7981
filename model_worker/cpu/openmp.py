"""Finds the OpenMP thread pool that torch runs on, so that the kernels run on the same one.

A process with two OpenMP runtimes has two pools, whose waiting threads take the cores from each other.
"""

import ctypes
import re
import sys
from pathlib import Path

import torch

_RUNTIME = re.compile(r"lib(gomp|omp|iomp5)\b[^/]*\.(so|dylib)")


def parallel_function() -> int | None:
    """The address of `GOMP_parallel` in torch's OpenMP runtime (libgomp and LLVM's libomp have it); None if unknown."""
    for path in _candidates():
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _candidates() -> list[str]:
    """OpenMP runtimes that are loaded, torch's own copy first. Where that cannot be listed: those that torch ships."""
    torch_dir = Path(torch.__file__).parent
    if sys.platform == "linux":
        lines = Path("/proc/self/maps").read_text().splitlines()
        loaded = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/" in line)
        runtimes = [path for path in loaded if _RUNTIME.match(Path(path).name)]
        return sorted(runtimes, key=lambda path: not path.startswith(str(torch_dir)))
    return [str(path) for path in sorted((torch_dir / "lib").glob("*")) if _RUNTIME.match(path.name)]
