"""The quantised forms that Qwen3 is published in: what config.json says of them, and which tensors stand for a matrix.

model_worker/quantized_files.py makes matrices of the tensors. O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

FP8, AWQ, GPTQ = "fp8", "awq", "gptq"
MATRIX = re.compile(r"(.*\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj))\.weight")
FLOATS = ("F32", "BF16", "F16")
Stored = tuple[tuple[int, ...], tuple[str, ...]]  # a tensor's shape, and the types that it may have
READ = {"quant_method", "modules_to_not_convert"}  # of any form; the forms' own are in _RULES
# Keys of quantization_config that say how it was made, not what it is.
UNUSED = {
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential",
    "model_name_or_path", "model_file_base_name", "is_marlin_format", "meta", "sym", "desc_act", "backend", "quantizer",
    "use_exllama", "exllama_config", "max_input_length", "cache_block_outputs", "tokenizer", "dataset", "batch_size",
    "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "use_cuda_fp16", "model_seqlen",
    "disable_exllama", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_version", "pack_dtype", "mse",
}  # fmt: skip


class QuantizedForm(msgspec.Struct, frozen=True, kw_only=True):
    """group: inputs that share a scale; of fp8 a block has as many outputs too. kept: modules that are not quantised.

    zero_offset: what gptq's zero points have been lowered by.
    """

    method: str
    bits: int
    group: int
    kept: tuple[str, ...] = ()
    zero_offset: int = 0

    def applies(self, name: str) -> bool:
        """Whether the matrix called `name`, such as model.layers.0.mlp.up_proj.weight, is quantised."""
        match = MATRIX.fullmatch(name)
        return match is not None and not any(f".{kept}." in f".{match[1]}." for kept in self.kept)

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
        """The tensors that stand for the matrix `name` of `shape` [O, I]; ValueError where that cannot be."""
        (outputs, inputs), base = shape, name.removesuffix(".weight")
        groups = -(-inputs // self.group)
        if self.method == FP8:
            scales = (-(-outputs // self.group), groups)
            return {name: (shape, ("F8_E4M3",)), f"{name}_scale_inv": (scales, FLOATS)}
        packed = 32 // self.bits
        if inputs % self.group or outputs % packed or inputs % packed:
            raise ValueError(
                f"{inputs} inputs are no whole groups of {self.group}, or {outputs} outputs none of {packed}"
            )
        tensors: dict[str, Stored] = {
            f"{base}.qzeros": ((groups, outputs // packed), ("I32",)),
            f"{base}.scales": ((groups, outputs), FLOATS),
        }
        if self.method == AWQ:
            return tensors | {f"{base}.qweight": ((inputs, outputs // packed), ("I32",))}
        return tensors | {
            f"{base}.qweight": ((inputs // packed, outputs), ("I32",)),
            f"{base}.g_idx": ((inputs,), ("I32",)),
        }


def read_form(config: Any, error: Callable[[str], Exception]) -> QuantizedForm:
    """The form that a quantization_config describes; `error` makes what is raised, from what is wrong with it."""
    if not isinstance(config, dict):
        raise error("must be an object")
    method = config.get("quant_method")
    rules = _RULES.get(method) if isinstance(method, str) else None
    if rules is None:
        raise error(f"has quant_method {str(method)[:40]!r}, which is not supported; only {', '.join(_RULES)} are")
    for key, value in config.items():
        if value is None or key in READ | UNUSED:
            continue
        allowed = rules.get(key, ())
        if not any(type(value) is type(other) and value == other for other in allowed):
            hint = f"{method} may have {' or '.join(map(repr, allowed))}" if allowed else "that is not supported"
            raise error(f"has {key[:40]}={str(value)[:40]}; {hint}")
    if method == FP8 and config.get("weight_block_size") is None:
        raise error("has no weight_block_size; only blocks of 128 x 128 are supported")
    kept = config.get("modules_to_not_convert") or ()
    if not isinstance(kept, list | tuple) or not all(isinstance(name, str) for name in kept):
        raise error("must have a list of names in modules_to_not_convert")
    group, bits = 128, 8
    if method != FP8:
        group = config.get("group_size") or config.get("q_group_size") or 128
        bits = config.get("bits") or config.get("w_bit") or 4
    old = method == GPTQ and config.get("checkpoint_format") != "gptq_v2"
    return QuantizedForm(method=str(method), bits=bits, group=group, kept=tuple(kept), zero_offset=int(old))


_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_RULES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    FP8: {"fmt": ("e4m3",), "activation_scheme": ("dynamic",), "weight_block_size": ([128, 128],)},
    AWQ: {
        "bits": (4,), "w_bit": (4,), "group_size": _GROUPS, "q_group_size": _GROUPS, "zero_point": (True,),
        "version": ("gemm", "GEMM"),
    },
    GPTQ: {
        "bits": (4, 8), "group_size": _GROUPS, "lm_head": (False,), "checkpoint_format": ("gptq", "gptq_v2"),
        "version": (None,),
    },
}  # fmt: skip
