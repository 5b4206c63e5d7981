"""What a rank's memory is needed for, by part, from the configuration alone: before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from vibe_sgl_lite.runtime.settings.checkpoint import EMBEDDING, HEAD, tensor_shapes
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
INT8_SCALE_BYTES = 4  # of each head's key and value in the cache, and of each output of a matrix
INT4_GROUP, INT4_GROUP_BYTES = 32, 20  # codes of 4 bits, a scale and an offset of 16
PARTS = ("embedding", "head", "attention", "MLPs", "experts", "norms and routers")


class RankMemory(msgspec.Struct, frozen=True):
    """Bytes of one rank. weights: by part, in the order of PARTS. kv_token: of one token in the cache."""

    weights: dict[str, int]
    kv_token: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


def rank_memory(
    config: ModelConfig, *, tp: int, ep: int, dtype: str, quantization: str = "none", int8_cache: bool = False
) -> RankMemory:
    """The same for every rank: shares are equal, but of the vocabulary, where the largest counts. tp, ep: as
    `check_parallel_degrees` allows."""
    size = DTYPE_BYTES[dtype]
    weights = dict.fromkeys(PARTS, 0)
    for name, shape in tensor_shapes(config).items():
        part, ranks, output_ranks = _split(name, tp, ep, config)
        elements, outputs = math.prod(shape) // ranks, shape[0] // output_ranks
        if part in ("embedding", "head"):
            outputs = -(-shape[0] // ranks)
            elements = outputs * shape[1]
        if part == "embedding" and config.tie_word_embeddings:
            weights["head"] += _matrix_bytes(elements, outputs, size, quantization)
            weights[part] += 0 if quantization == "none" else elements * size  # rows cannot be had of codes
        elif part in ("embedding", "norms and routers"):
            weights[part] += elements * size
        else:
            weights[part] += _matrix_bytes(elements, outputs, size, quantization)
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


def _matrix_bytes(elements: int, outputs: int, size: int, quantization: str) -> int:
    if quantization in ("int8", "fp8"):
        return elements + outputs * INT8_SCALE_BYTES
    if quantization == "int4":
        return elements // INT4_GROUP * INT4_GROUP_BYTES
    return elements * size
