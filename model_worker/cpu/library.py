"""The compiled kernels as ctypes sees them. native/abi.h is the one table: its structures are read from there."""

import ctypes
import re
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parent / "native" / "abi.h"
_TYPES: dict[str, Any] = {"int64_t": c_int64, "float": c_float}


@cache
def structures() -> dict[str, type[Structure]]:
    """The structures of abi.h by their names, in its order."""
    known: dict[str, type[Structure]] = {}
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for declaration in body.split(";")[:-1]:
            kind, rest = declaration.replace("const ", "").strip().split(maxsplit=1)
            for field in rest.split(","):
                pointer = "*" in kind + field
                fields.append((field.strip(" *"), c_void_p if pointer else _TYPES.get(kind) or known[kind]))
        known[name] = type(name, (Structure,), {"_fields_": fields})
    return known


def layout_source() -> str:
    """C++ that puts the sizes of all structures and the offsets of their fields into the compiled object."""
    numbers = []
    for name, structure in structures().items():
        numbers.append(f"sizeof(vsl::{name})")
        numbers += [f"offsetof(vsl::{name}, {field[0]})" for field in structure._fields_]
    return f'#include <cstddef>\nextern "C" const int64_t vsl_layout[] = {{{", ".join(numbers)}, -1}};\n'


def _layout() -> list[int]:
    numbers: list[int] = []
    for structure in structures().values():
        numbers.append(ctypes.sizeof(structure))
        numbers += [getattr(structure, field[0]).offset for field in structure._fields_]
    return [*numbers, -1]


def open_library(path: Path) -> ctypes.CDLL:
    """Raises OSError when `path` is no shared object of these functions, or one with other structures."""
    library = ctypes.CDLL(str(path))
    try:
        expected = _layout()
        if list((c_int64 * len(expected)).in_dll(library, "vsl_layout")) != expected:
            raise OSError(f"{path} was compiled with other structures than {HEADER}")
        for name, structure in structures().items():
            if name.endswith("Call"):
                function = getattr(library, function_name(name))
                function.argtypes, function.restype = [c_void_p, POINTER(structure)], None
        library.vsl_create.argtypes, library.vsl_create.restype = [c_void_p, c_int], c_void_p
        library.vsl_fix_order.argtypes, library.vsl_fix_order.restype = [c_void_p], None
        library.vsl_destroy.argtypes, library.vsl_destroy.restype = [c_void_p], None
        library.vsl_instruction_set.argtypes, library.vsl_instruction_set.restype = [c_void_p], c_char_p
    except (AttributeError, ValueError) as error:
        raise OSError(f"{path} lacks what {HEADER} has: {error}") from error
    return library


def function_name(call: str) -> str:
    """AddRmsNormCall -> vsl_add_rms_norm."""
    return "vsl" + re.sub(r"([A-Z])", lambda match: "_" + match[1].lower(), call.removesuffix("Call"))
