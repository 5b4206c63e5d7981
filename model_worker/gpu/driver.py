"""Kernels in CUDA C++: compiled by NVRTC, which comes with torch, kept in the cache folder, launched by the driver.

For what Triton 3.6 has no words for: blocks of a cluster that read each other's memory.
"""

import ctypes
import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.kernel_cache import default_cache_dir, is_ours, whole_file

FLAGS = ("--gpu-architecture=sm_90a", "--std=c++17", "--use_fast_math")
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAX_SHARED_BYTES, CLUSTER_DIMENSION, DEPENDENT_LAUNCH = 8, 4, 6  # of the driver's enumerations
SWIZZLE_128_BYTES, PROMOTE_128_BYTES = 3, 2
NUMBERS = {torch.float16: 6, torch.bfloat16: 9}

log = logging.getLogger(__name__)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class TensorMap:
    """How a matrix of 16-bit numbers lies, for the card's copy engine: in boxes of `lines` by 64 columns, swizzled by
    128 bytes; what is outside of the matrix is zero."""

    def __init__(self, matrix: Tensor, lines: int) -> None:
        assert matrix.is_contiguous()
        self._room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        self.address = -(-ctypes.addressof(self._room) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        height, width = matrix.shape
        _check(
            _driver().cuTensorMapEncodeTiled(
                ctypes.c_void_p(self.address), NUMBERS[matrix.dtype], 2, ctypes.c_void_p(matrix.data_ptr()),
                (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(width * 2),
                (ctypes.c_uint32 * 2)(64, lines), (ctypes.c_uint32 * 2)(1, 1), 0, SWIZZLE_128_BYTES, PROMOTE_128_BYTES,
                0,
            )
        )  # fmt: skip


class Kernel:
    """A function of a compiled source, with so much shared memory a block."""

    def __init__(self, source: str, name: str, shared_bytes: int) -> None:
        module, self._function, self._shared_bytes = ctypes.c_void_p(), ctypes.c_void_p(), shared_bytes
        _check(_driver().cuModuleLoadData(ctypes.byref(module), _compiled(source)))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, MAX_SHARED_BYTES, shared_bytes))

    def __call__(
        self,
        arguments: Sequence[TensorMap | Tensor | int | float | None],
        grid: tuple[int, int, int],
        threads: int,
        cluster: tuple[int, int, int],
        *,
        pdl: bool,
    ) -> None:
        """On torch's current stream. Tensors go as their addresses, numbers as 32 bits."""
        values = [_value(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(
            *(value.address if isinstance(value, TensorMap) else ctypes.addressof(value) for value in values)
        )
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[1].id = CLUSTER_DIMENSION, DEPENDENT_LAUNCH
        attributes[0].value[:3] = cluster
        attributes[1].value[0] = pdl
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(grid, (threads, 1, 1), self._shared_bytes, stream, attributes, len(attributes))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, places, None))


@cache
def has_clusters(device: torch.device) -> bool:
    """Whether a device runs kernels of this file, and there is what compiles them; else the log says why."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # the driver loads nothing before torch has made a context
            Kernel('extern "C" __global__ void nothing() {}', "nothing", 0)
    except (OSError, RuntimeError) as error:
        log.warning("products go without clusters of blocks, which are faster: %s", error)
        return False
    return True


def compile_source(source: str) -> bytes:
    """The binary. Raises RuntimeError with the compiler's words, OSError where there is no compiler."""
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise RuntimeError("NVRTC takes no source")
    try:
        flags = (ctypes.c_char_p * len(FLAGS))(*(flag.encode() for flag in FLAGS))
        if nvrtc.nvrtcCompileProgram(program, len(flags), flags):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            words = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, words)
            raise RuntimeError(words.value.decode())
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, binary)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


def _compiled(source: str) -> bytes:
    """From the cache folder, compiled first where it has none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = repr((major.value, minor.value, FLAGS, source))
    try:
        built = default_cache_dir() / f"gpu_kernel-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
        if is_ours(built):
            return built.read_bytes()
        binary = compile_source(source)
        with whole_file(built, 0o600) as unfinished:
            unfinished.write_bytes(binary)
    except OSError as error:
        log.warning("a kernel is compiled at every start: %s", error)
        return compile_source(source)
    return binary


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> ctypes.CDLL:
    """Of torch's version of CUDA, out of the packages that torch came with, or a toolkit. Raises OSError."""
    version = torch.version.cuda or "12"
    major = version.partition(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    toolkits = (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path(f"/usr/local/cuda-{version}"))
    folders = (packages / f"cu{major}" / "lib", packages / "cuda_nvrtc" / "lib", *(base / "lib64" for base in toolkits))
    found = (str(folder / name) for folder in folders if (folder / name).exists())
    return ctypes.CDLL(next(found, name))


def _value(argument: TensorMap | Tensor | int | float | None) -> Any:
    if isinstance(argument, TensorMap):
        return argument
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"the CUDA driver fails with {result}")
