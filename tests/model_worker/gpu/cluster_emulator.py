"""Runs kernels/cluster_product.cu on a CPU: its instructions of a card are those of emulated_cluster.cpp."""

import ctypes
import re
import subprocess
from pathlib import Path

from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ProductForm

EMULATED = {
    **dict.fromkeys(("init", "expect", "arrive", "wait", "bring", "number", "pair", "multiply"), ""),
    "meet_cluster": "void meet_cluster();",
    "add_up": "float4 add_up(u32 at);",
}
INSTRUCTIONS = (
    (r'asm volatile\("bar\.sync 1[^\n]*\);', "multiplying_meet();"),
    (r'asm volatile\("wgmma\.wait_group[^\n]*\);', "warp_meets();"),
    (r"asm volatile\([^\n]*\);", ";"),
    (r"extern __shared__ [^\n]*;", "char* shared = mine->memory;"),
)


class _Matrix(ctypes.Structure):
    """What a map for the copy engine tells."""

    _fields_ = (("data", ctypes.c_void_p), ("lines", ctypes.c_int), ("columns", ctypes.c_int), ("box", ctypes.c_int))


def emulated_source(form: ProductForm) -> str:
    text = form.source()
    for name, instead in EMULATED.items():
        function = rf"__device__ __forceinline__ [\w ]+ {name}\([^{{]*\{{\n.*?\n\}}\n"
        text, found = re.subn(function, instead + "\n", text, flags=re.DOTALL)
        assert found == 1, name
    for instruction, instead in INSTRUCTIONS:
        text, found = re.subn(instruction, instead, text)
        assert found, instruction
    assert "asm" not in text
    return Path(__file__).with_name("emulated_cluster.cpp").read_text().replace("SOURCE\n", text, 1)


def emulate(
    form: ProductForm,
    folder: Path,
    x: Tensor,
    matrix: Tensor,
    output: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    addend: Tensor | None = None,
    gain: Tensor | None = None,
    gained: Tensor | None = None,
    new_squares: Tensor | None = None,
) -> None:
    """As `cluster_product`, in bf16. folder: to compile in."""
    source, library = folder / "emulated.cpp", folder / "emulated.so"
    source.write_text(emulated_source(form))
    flags = ["-O1", "-std=c++17", "-w", "-pthread", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", library, source], check=True)
    boxes = (
        _Matrix(tensor.data_ptr(), *tensor.shape, lines)
        for tensor, lines in ((x, form.tiles.rows), (matrix, form.tiles.outputs))
    )
    tensors = squares, addend, gain, output, gained, new_squares
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    ctypes.CDLL(str(library)).run(*boxes, *pointers, ctypes.c_int(len(x)), ctypes.c_float(eps))
