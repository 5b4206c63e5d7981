"""The C functions of native/kernels.cpp as ctypes sees them. Types must be declared: pointers do not fit a C int."""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

_TYPES = {"p": c_void_p, "i": c_int, "q": c_int64, "f": c_float}
_POOL = "pp qqqqq"  # keys, values; page size, the strides of page, token and head; where in a page int8's scales begin

# One letter an argument, in the order of kernels.cpp; the first is the context, unless there is none yet or no need.
_ARGUMENTS = {
    "vsl_create": "pi",
    "vsl_destroy": "p",
    "vsl_instruction_set": "p",
    "vsl_paged_attention": f"pi pq {_POOL} pppq iiii f q p",
    "vsl_store_kv": f"pi pqq pqq {_POOL} p q ii",
    "vsl_rms_norm": "pi pq ppp qq f",
    "vsl_qkv_rope_store": f"pi pq pp f ppq p {_POOL} p q iii",
    "vsl_silu_mul": "pi ppq p qq",
    "vsl_argmax": "pi pq p qq",
    "vsl_linear": "pii pp qq pq q p",
    "vsl_pack_int8": "pi p qq pp",
    "vsl_pack_int4": "pi p qq p",
    "vsl_decoder_layers": "pi pp",
    "vsl_gather_rows": "p pq pq p",
}
_RESULTS = {"vsl_create": c_void_p, "vsl_instruction_set": c_char_p}


def open_library(path: Path) -> ctypes.CDLL:
    """Raises OSError when `path` is no shared object of these functions."""
    library = ctypes.CDLL(str(path))
    for name, letters in _ARGUMENTS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} lacks {name}") from error
        function.argtypes = [_TYPES[letter] for letter in letters if letter != " "]
        function.restype = _RESULTS.get(name)
    return library
