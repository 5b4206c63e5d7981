"""Every tensor of a checkpoint accounted for: used by the model that config.json describes, known to be needless, or
refused by name and count. From the files' headers alone, so that nothing has to be started to find out.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.quantized_form import Stored
from vibe_sgl_lite.runtime.settings.safetensors_files import ITEM_BITS, StoredTensor, stored_tensors, unread_files

PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a weight may be stored as, and the model's dtype where config.json names none.
DTYPES: Mapping[str, str] = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Buffers that old versions of transformers saved beside the weights; they follow from config.json.
NEEDLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
# What tensors without a place are, by their names, the first that fits; `_leftovers` knows of layers and experts.
KINDS: Mapping[str, re.Pattern[str]] = {
    "of an adapter (merge it into the weights)": re.compile(r"lora_|adapter"),
    "of a quantised checkpoint whose config.json has no quantization_config": re.compile(
        r"scale|zero|qweight|g_idx|absmax|quant|packed"
    ),
    "biases, which Qwen3 has none of": re.compile(r"\.bias$"),
    "of names that Qwen3 does not have": re.compile(""),
}
COMPARED_AT_ONCE = 1 << 24  # bytes

log = logging.getLogger(__name__)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape: names as transformers saves them, [out, in] for matrices."""
    return dict(_tensors(config))


def stored_shapes(config: ModelConfig) -> dict[str, Stored]:
    """Every tensor as its file has it: its shape, and the types that it may have. ValueError for impossible groups."""
    shapes: dict[str, Stored] = {}
    for name, shape in tensor_shapes(config).items():
        if config.quantized is not None and config.quantized.applies(name):
            shapes |= config.quantized.stored(name, shape)
        else:
            shapes[name] = shape, tuple(DTYPES)
    return shapes


def find_tensors(config: ModelConfig, folder: str | Path) -> dict[str, StoredTensor]:
    """Where each of `stored_shapes(config)` is stored in `folder`.

    Names may have or lack the prefix "model.", as in transformers; a head that is tied may be the only copy.
    Raises WeightsError: what `stored_tensors` raises, and tensors of a type that is no weight's, without a place in
    the model, missing or of another shape, each kind by its first name and count.
    """
    folder = Path(folder)
    try:
        shapes = stored_shapes(config)
    except ValueError as error:
        raise WeightsError(f"{folder}: quantization_config does not fit the model: {error}") from error
    found: dict[str, StoredTensor] = {}
    left: list[str] = []
    for stored in stored_tensors(folder).values():
        candidates = (stored.name.removeprefix(PREFIX), PREFIX + stored.name, stored.name)
        name = next((name for name in candidates if name in shapes or name == HEAD), None)
        if name is not None and name not in found:
            found[name] = stored
        elif not NEEDLESS.fullmatch(stored.name):
            left.append(stored.name)
    if config.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        found.setdefault(EMBEDDING, head)
    _check_dtypes(folder, found, shapes)
    if left:
        raise WeightsError(
            f"{folder}: {_tensors_words(len(left))} without a place in this model: {_kinds(config, left)}; use the "
            "config.json that came with these weights",
            field=left[0],
        )
    missing = [name for name in shapes if name not in found]
    if missing:
        raise WeightsError(
            f"{folder}: no file has the tensor {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; the checkpoint does not belong to this config.json or is incomplete, download it again",
            field=missing[0],
        )
    for name, (shape, _) in shapes.items():
        stored = found[name]
        if stored.shape != shape:
            raise WeightsError(
                f"{stored.path}: {stored.name} has shape {list(stored.shape)}, config.json asks for {list(shape)}; "
                "use the config.json that came with these weights",
                field=name,
            )
    return found


def settle(config: ModelConfig, folder: str | Path) -> ModelConfig:
    """`config` with what only the files tell: the dtype, where config.json names none, and which head there is.

    As transformers 5 has it, a head of its own counts, whatever config.json says; then there is a warning. A model that
    was saved from below its head, with names that lack "model.", has none unless it is tied: Qwen3-Embedding-8B.
    Raises WeightsError as `find_tensors` does.
    """
    folder = Path(folder)
    if not config.tie_word_embeddings:
        names = stored_tensors(folder).keys()
        if EMBEDDING.removeprefix(PREFIX) in names and HEAD not in names:
            config = msgspec.structs.replace(config, tie_word_embeddings=True, has_head=False)  # so it takes no memory
    tensors = find_tensors(config, folder)
    others = unread_files(folder)
    if others:
        log.warning("%s: not part of the checkpoint and not read: %s", folder, ", ".join(others))
    if config.tie_word_embeddings:
        stored = stored_tensors(folder)
        heads = [stored[name] for name in (HEAD, PREFIX + HEAD) if name in stored]
        if heads and not _equal(tensors[EMBEDDING], heads[0]):
            log.warning(
                "%s: config.json says tie_word_embeddings, but %s differs from %s, so it is used as a head of its own",
                folder, heads[0].name, tensors[EMBEDDING].name,
            )  # fmt: skip
            config = msgspec.structs.replace(config, tie_word_embeddings=False)
            tensors = find_tensors(config, folder)
    if config.dtype is None:
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            if tensor.dtype in DTYPES:
                sizes[DTYPES[tensor.dtype]] += (tensor.stop - tensor.start) * 8 // ITEM_BITS[tensor.dtype]
        config = msgspec.structs.replace(config, dtype=sizes.most_common(1)[0][0])
    return config


# Of config.json, what may differ between checkpoints that take each other's place.
FREE_FIELDS = frozenset({"dtype", "eos_token_ids", "bos_token_id", "generation_defaults", "initializer_range"})


def check_fits(config: ModelConfig, folder: str | Path) -> None:
    """Whether the checkpoint in `folder` can take the place of one of `config`'s, its files whole by their headers.

    Raises ModelConfigError and WeightsError as a start does, and WeightsError naming a field that is not the same.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"path={folder} is no model folder: it has no config.json", field="path")
    new = settle(ModelConfig.from_folder(folder), folder)
    for field in ModelConfig.__struct_fields__:
        if field not in FREE_FIELDS and getattr(new, field) != getattr(config, field):
            raise WeightsError(
                f"{folder}: {field}={getattr(new, field)} where the model that is served has "
                f"{getattr(config, field)}: only weights of the same shape can take its place",
                field=field,
            )


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield EMBEDDING, (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.q_norm.weight", (dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (dim,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if config.layer_is_moe(layer):
            yield f"{prefix}.mlp.gate.weight", (config.num_experts, hidden)
            blocks = [f"{prefix}.mlp.experts.{expert}" for expert in range(config.num_experts)]
        else:
            blocks = [f"{prefix}.mlp"]
        width = config.moe_intermediate_size if config.layer_is_moe(layer) else config.intermediate_size
        for block in blocks:
            yield f"{block}.gate_proj.weight", (width, hidden)
            yield f"{block}.up_proj.weight", (width, hidden)
            yield f"{block}.down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, hidden)


def _check_dtypes(folder: Path, found: Mapping[str, StoredTensor], shapes: Mapping[str, Stored]) -> None:
    odd = [tensor for name, tensor in found.items() if tensor.dtype not in shapes.get(name, ((), DTYPES))[1]]
    if odd:
        types = ", ".join(sorted({tensor.dtype for tensor in odd}))
        raise WeightsError(
            f"{folder}: {_tensors_words(len(odd))} of type {types}, such as {odd[0].name}, and config.json has no "
            f"quantization_config that says so; use weights in {', '.join(DTYPES)}, or the config.json that they had",
            field=odd[0].name,
        )


def _kinds(config: ModelConfig, names: list[str]) -> str:
    """`22 of layers beyond num_hidden_layers=2 (model.layers.2.mlp.up_proj.weight ...), 1 ...`."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name in sorted(names):
        layer = re.search(r"layers\.(\d+)\.", name)
        expert = re.search(r"experts\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            kind = f"of layers beyond num_hidden_layers={config.num_hidden_layers}"
        elif expert and config.num_experts and int(expert[1]) >= config.num_experts:
            kind = f"of experts beyond num_experts={config.num_experts}"
        else:
            kind = next(kind for kind, pattern in KINDS.items() if pattern.search(name))
        first.setdefault(kind, name)
        counts[kind] += 1
    return ", ".join(f"{counts[kind]} {kind}, such as {name}" for kind, name in first.items())


def _tensors_words(count: int) -> str:
    return f"{count} tensor" + ("s" if count > 1 else "")


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors are the same, bit by bit."""
    if first == second:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.stop - first.start
        while left:
            size = min(left, COMPARED_AT_ONCE)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True
