"""What a rank's memory is needed for, by part, from the configuration alone: before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from vibe_sgl_lite.runtime.settings.checkpoint import EMBEDDING, HEAD, tensor_shapes
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.quantized_form import FP8, GPTQ

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
INT8_SCALE_BYTES = 4  # of each head's key and value in the cache, and of each output of a matrix
INT4_GROUP, INT4_GROUP_BYTES = 32, 20  # codes of 4 bits, a scale and an offset of 16
# On a GPU: a group's scale and zero, or scale of e4m3; inputs that share one where they are quantised here, and the
# most of 4 bits and of e4m3 that its kernels let share one.
GPU_SCALE_BYTES, GPU_INT4_GROUP, GPU_MOST = 4, 128, {4: 256, 8: 128}
PARTS = ("embedding", "head", "attention", "MLPs", "experts", "norms and routers")


class RankMemory(msgspec.Struct, frozen=True):
    """Bytes of one rank. weights: by part, in the order of PARTS. kv_token: of one token in the cache."""

    weights: dict[str, int]
    kv_token: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


def rank_memory(
    config: ModelConfig, *, tp: int, ep: int, dtype: str, quantization: str = "none", int8_cache: bool = False,
    gpu: bool = False,
) -> RankMemory:  # fmt: skip
    """The same for every rank: shares are equal, but of the vocabulary, where the largest counts. tp, ep: as
    `check_parallel_degrees` allows. gpu: where a quantised checkpoint's codes stay what they are; what fills up odd
    sizes there is not counted."""
    size = DTYPE_BYTES[dtype]
    weights = dict.fromkeys(PARTS, 0)
    for name, shape in tensor_shapes(config).items():
        part, ranks, output_ranks = _split(name, tp, ep, config)
        codes = _codes(config, name, quantization) if gpu else None
        if part == "experts" and codes is not None:
            codes = _expert_codes(config, tp // ep)
        elements, outputs = math.prod(shape) // ranks, shape[0] // output_ranks
        if part in ("embedding", "head"):
            outputs = -(-shape[0] // ranks)
            elements = outputs * shape[1]
        rows = _matrix_bytes(elements, outputs, size, "int8" if quantization == "int4" and not gpu else "none", None)
        if part == "embedding" and config.tie_word_embeddings:
            weights["head"] += _matrix_bytes(elements, outputs, size, quantization, codes)
            weights[part] += 0 if quantization == "none" else rows  # which cannot be had of the head's codes
        elif part == "embedding":
            weights[part] += rows
        elif part == "norms and routers":
            weights[part] += elements * size
        else:
            weights[part] += _matrix_bytes(elements, outputs, size, quantization, codes)
    scale = INT8_SCALE_BYTES if int8_cache else 0
    return RankMemory(weights, config.kv_bytes_per_token(tp, 1 if int8_cache else size, scale))


def _split(name: str, tp: int, ep: int, config: ModelConfig) -> tuple[str, int, int]:
    """The part that a tensor belongs to, over how many ranks it is split, and over how many its outputs are."""
    if name in (EMBEDDING, HEAD):
        return ("embedding" if name == EMBEDDING else "head"), tp, tp
    if ".k_proj." in name or ".v_proj." in name:
        ranks = min(tp, config.num_key_value_heads)  # heads are repeated where ranks exceed them
        return "attention", ranks, ranks
    if ".self_attn." in name and "_proj." in name:
        return "attention", tp, 1 if ".o_proj." in name else tp
    if "_proj." in name:
        whole = ep if ".experts." in name else 1  # the ranks that have other experts
        return ("experts" if ".experts." in name else "MLPs"), tp, whole if ".down_proj." in name else tp
    return "norms and routers", 1, 1


def _codes(config: ModelConfig, name: str, quantization: str) -> tuple[int, int] | None:
    """The bits that a GPU keeps a matrix's elements in, and how many of them share a scale; None for other formats."""
    if quantization == "int4":
        return 4, GPU_INT4_GROUP
    form = config.quantized
    if quantization != "none" or form is None or not form.applies(name) or (form.method == GPTQ and form.bits != 4):
        return None
    return form.bits, min(form.group, GPU_MOST[form.bits])


def _expert_codes(config: ModelConfig, parts: int) -> tuple[int, int] | None:
    """The same of experts that are split in so many parts: fp8, where a part has whole blocks."""
    form = config.quantized
    if form is None or form.method != FP8 or config.hidden_size % form.group:
        return None
    return None if config.moe_intermediate_size % (form.group * parts) else (8, form.group**2)


def _matrix_bytes(elements: int, outputs: int, size: int, quantization: str, codes: tuple[int, int] | None) -> int:
    if codes is not None:
        bits, group = codes
        return elements * bits // 8 + elements // group * GPU_SCALE_BYTES
    if quantization in ("int8", "fp8"):
        return elements + outputs * INT8_SCALE_BYTES
    if quantization == "int4":
        return elements // INT4_GROUP * INT4_GROUP_BYTES
    return elements * size
