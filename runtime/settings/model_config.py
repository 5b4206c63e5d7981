"""What a model folder says about its model: config.json and generation_config.json, read and checked once.

Knows nothing about tensors: every process reads it, most of them without torch. A `ModelConfig` that exists is one that
`qwen3` can run; whatever is not supported is refused here by field and value.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import ModelConfigError

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
# What transformers fills in for a key that config.json leaves out.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_HEAD_DIM_DENSE = 128


class GenerationDefaults(msgspec.Struct, frozen=True):
    """The model's own sampling values, from generation_config.json; None where it names none. top_k -1 is off."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """The values that are set, by the names of `SamplingParams`."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One model's shape. `num_experts` is 0 for a dense model.

    dtype: that of the checkpoint; None where config.json names none (runtime/settings/checkpoint.py finds it).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str | None
    initializer_range: float
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    generation_defaults: GenerationDefaults
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json and, if it is there, `folder`/generation_config.json.

        Raises ModelConfigError naming the file, field and value when something is missing, malformed or not supported.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise ModelConfigError(
                f"{path} does not exist: --model-path must be a folder with config.json, "
                "tokenizer.json and *.safetensors"
            )
        fields = _Fields(path, _read_json_object(path))
        generation_path = folder / "generation_config.json"
        generation_values = _read_json_object(generation_path) if generation_path.is_file() else {}
        return _build(fields, _Fields(generation_path, generation_values))

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return any(self.layer_is_moe(layer) for layer in range(self.num_hidden_layers))

    def layer_is_moe(self, layer: int) -> bool:
        """Whether `layer` (from 0) has experts in place of one MLP."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def local_kv_heads(self, tp_size: int) -> int:
        """KV heads that one of `tp_size` ranks holds: its share, or one replicated head when there are fewer heads."""
        return max(1, self.num_key_value_heads // tp_size)

    def kv_bytes_per_token(self, tp_size: int, element_bytes: int, scale_bytes: int = 0) -> int:
        """Bytes of KV cache one token takes on one rank, keys and values of all layers together.

        scale_bytes: what each head's key, and each head's value, takes beside its elements.
        """
        head_bytes = self.head_dim * element_bytes + scale_bytes
        return 2 * self.num_hidden_layers * self.local_kv_heads(tp_size) * head_bytes


def check_parallel_degrees(config: ModelConfig, tp_size: int, ep_size: int) -> None:
    """Refuse tensor and expert parallel degrees that do not divide the model; ModelConfigError names the possible ones.

    There are `tp_size` ranks. `ep_size` divides them; each expert is split over tp_size / ep_size of them.
    """
    possible = [degree for degree in range(1, 129) if _tp_problem(config, degree) is None]
    problem = _tp_problem(config, tp_size)
    if problem is not None:
        raise ModelConfigError(
            f"--tp {tp_size} does not fit this model: {problem}; possible: {_join(possible)}", field="tp"
        )
    problem = _ep_problem(config, tp_size, ep_size)
    if problem is not None:
        possible = [degree for degree in range(1, tp_size + 1) if _ep_problem(config, tp_size, degree) is None]
        hint = _join(possible) if possible else "none, choose another --tp"
        raise ModelConfigError(f"--ep {ep_size} does not fit --tp {tp_size}: {problem}; possible: {hint}", field="ep")


def _tp_problem(config: ModelConfig, tp_size: int) -> str | None:
    if tp_size < 1:
        return "it must be 1 or more"
    if config.num_attention_heads % tp_size:
        return f"num_attention_heads={config.num_attention_heads} is not divisible by {tp_size}"
    kv_heads = config.num_key_value_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        return f"num_key_value_heads={kv_heads} neither divides {tp_size} nor is divisible by it"
    if config.vocab_size % tp_size:
        return f"vocab_size={config.vocab_size} is not divisible by {tp_size}"
    has_dense_layer = any(not config.layer_is_moe(layer) for layer in range(config.num_hidden_layers))
    if has_dense_layer and config.intermediate_size % tp_size:
        return f"intermediate_size={config.intermediate_size} is not divisible by {tp_size}"
    return None


def _ep_problem(config: ModelConfig, tp_size: int, ep_size: int) -> str | None:
    if ep_size < 1:
        return "it must be 1 or more"
    if not config.is_moe:
        return None if ep_size == 1 else f"{config.architecture} has no experts"
    if tp_size % ep_size:
        return f"--tp {tp_size} is not divisible by {ep_size}"
    if config.num_experts % ep_size:
        return f"num_experts={config.num_experts} is not divisible by {ep_size}"
    split = tp_size // ep_size
    if config.moe_intermediate_size % split:
        return f"moe_intermediate_size={config.moe_intermediate_size} is not divisible by tp / ep = {split}"
    return None


def _join(degrees: list[int]) -> str:
    return ", ".join(str(degree) for degree in degrees)


def _build(fields: "_Fields", generation: "_Fields") -> ModelConfig:
    architecture = _architecture(fields)
    is_moe = architecture == "Qwen3MoeForCausalLM"
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
    head_dim = fields.integer("head_dim", hidden_size // heads if is_moe else _DEFAULT_HEAD_DIM_DENSE)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "must be even, rotary embedding turns pairs")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(fields),
        initializer_range=fields.number("initializer_range", 0.02),
        eos_token_ids=_eos_token_ids(fields, generation, fields.integer("vocab_size")),
        bos_token_id=fields.optional_integer("bos_token_id"),
        generation_defaults=_generation_defaults(generation),
        **(_expert_fields(fields) if is_moe else {}),
    )


def _architecture(fields: "_Fields") -> str:
    supported = " or ".join(SUPPORTED_ARCHITECTURES)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", names, f"must be a list of one name, {supported}")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise fields.error("architectures", names, f"is not supported; this engine runs {supported}")
    return str(names[0])


def _refuse_unsupported(fields: "_Fields") -> None:
    if fields.get("auto_map") is not None:
        raise fields.error(
            "auto_map", fields.get("auto_map"), "asks for code from the model folder, which is never run; remove it"
        )
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", fields.get("quantization_config"), "is not supported; use an unquantised checkpoint"
        )
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise fields.error("hidden_act", activation, "is not supported; only silu is")
    if fields.flag("attention_bias", False):
        raise fields.error("attention_bias", True, "is not supported; Qwen3 checkpoints have none")
    if fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None:
        raise fields.error(
            "sliding_window", fields.get("sliding_window"), "is not supported; set use_sliding_window to false"
        )
    layer_types = fields.get("layer_types")
    if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        raise fields.error("layer_types", layer_types, "is not supported; every layer must be full_attention")


def _rope_theta(fields: "_Fields") -> float:
    """Transformers 5 keeps theta and type in `rope_parameters`; 4 has `rope_theta` beside a `rope_scaling`."""
    theta = fields.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.error(key, rope, "must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise fields.error(
                key, rope, f"has rope type {kind!r}, which is not supported; only 'default' is (remove {key})"
            )
        theta = rope.get("rope_theta", theta)
    theta = _DEFAULT_ROPE_THETA if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise fields.error("rope_theta", theta, "must be a number above 0")
    return float(theta)


def _dtype(fields: "_Fields") -> str | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.get(key)
    if name is None:
        return None
    if name not in SUPPORTED_DTYPES:
        raise fields.error(key, name, f"is not supported; it must be one of {', '.join(SUPPORTED_DTYPES)}")
    return str(name)


def _eos_token_ids(fields: "_Fields", generation: "_Fields", vocab_size: int) -> tuple[int, ...]:
    """End tokens of both files, in order, once each; generation_config.json often lists more of them."""
    ids: list[int] = []
    for source in (fields, generation):
        value = source.get("eos_token_id")
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for token in listed:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise source.error("eos_token_id", value, "must be a token id or a list of them")
            if token >= vocab_size:
                raise source.error("eos_token_id", value, f"must be ids of the vocabulary, 0..{vocab_size - 1}")
            if token not in ids:
                ids.append(token)
    return tuple(ids)


def _generation_defaults(generation: "_Fields") -> GenerationDefaults:
    max_new_tokens = generation.optional_integer("max_new_tokens")
    if max_new_tokens is not None and not 0 < max_new_tokens < 2**31:
        raise generation.error("max_new_tokens", max_new_tokens, "must be from 1 to 2**31 - 1")
    if generation.get("do_sample") is False:
        # The model asks for greedy decoding; transformers then ignores temperature, top_k and top_p.
        return GenerationDefaults(
            temperature=0.0,
            max_new_tokens=max_new_tokens,
            repetition_penalty=generation.optional_number("repetition_penalty", above=0.0),
        )
    top_k = generation.optional_integer("top_k")
    return GenerationDefaults(
        temperature=generation.optional_number("temperature", at_least=0.0),
        top_k=-1 if top_k is not None and top_k <= 0 else top_k,  # transformers' 0 is our -1
        top_p=generation.optional_number("top_p", above=0.0, at_most=1.0),
        min_p=generation.optional_number("min_p", at_least=0.0, at_most=1.0),
        max_new_tokens=max_new_tokens,
        repetition_penalty=generation.optional_number("repetition_penalty", above=0.0),
    )


def _expert_fields(fields: "_Fields") -> dict[str, Any]:
    key = "num_local_experts" if fields.get("num_local_experts") is not None else "num_experts"
    num_experts = fields.integer(key)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", top_k, f"must not exceed {key}={num_experts}")
    mlp_only = fields.get("mlp_only_layers")
    mlp_only = [] if mlp_only is None else mlp_only
    if not isinstance(mlp_only, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in mlp_only):
        raise fields.error("mlp_only_layers", mlp_only, "must be a list of layer numbers")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.flag("norm_topk_prob", False),
        "decoder_sparse_step": fields.integer("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(mlp_only),
    }


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelConfigError(f"{path} cannot be read as JSON: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise ModelConfigError(f"{path} must hold a JSON object, not {type(value).__name__}; download the file again")
    return value


class _Fields:
    """Typed access to one file's values, with errors that name file, field and value."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def error(self, key: str, value: object, problem: str) -> ModelConfigError:
        return ModelConfigError(f"{self._path}: {key}={value!r} {problem}", field=key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of 1 or more; `default` stands in where the key is missing or null."""
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelConfigError(f"{self._path}: {key} is missing; the model cannot be built without it", field=key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, value, "must be a whole number of 1 or more")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "must be a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.optional_number(key, above=0.0)
        return default if value is None else value

    def optional_number(
        self, key: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
    ) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "must be a number")
        if above is not None and not value > above:
            raise self.error(key, value, f"must be above {above:g}")
        if at_least is not None and not value >= at_least:
            raise self.error(key, value, f"must be {at_least:g} or more")
        if at_most is not None and not value <= at_most:
            raise self.error(key, value, f"must be {at_most:g} or less")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return value
