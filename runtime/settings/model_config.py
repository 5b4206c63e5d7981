"""What a model folder says about its model: config.json and generation_config.json, read and checked once.

Knows nothing about tensors: every process reads it, most of them without torch. A `ModelConfig` that exists is one that
`qwen3` can run; whatever is not supported is refused here by field and value. docs/models.md has the tables.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vibe_sgl_lite.runtime.errors import ModelConfigError
from vibe_sgl_lite.runtime.settings.json_file import JsonFile
from vibe_sgl_lite.runtime.settings.quantized_form import QuantizedForm, read_form
from vibe_sgl_lite.runtime.settings.schema import Spec, shown, table

POOLING = "1_Pooling/config.json"  # of sentence-transformers
DENSE, MOE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
SUPPORTED_ARCHITECTURES = (DENSE, MOE)
MODEL_TYPES = {DENSE: "qwen3", MOE: "qwen3_moe"}
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_HEAD_DIM_DENSE = 128  # what transformers fills in
MAX_TOKENS = 2**31 - 1
MAX_CONTEXT = 2**21  # ranks keep a token id for each position of each slot
MAX_SIZE = 2**20  # of a matrix's side; the largest Qwen3 has 5,120 and 25,600
# Keys that must be absent, null or this, and why.
FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only silu is supported"),
    "attention_bias": (False, "Qwen3 checkpoints have none"),
    "mlp_bias": (False, "Qwen3 checkpoints have none"),
    "partial_rotary_factor": (1.0, "Qwen3 turns whole heads"),
    "auto_map": (None, "asks for code from the model folder, which is never run; remove it"),
    "compression_config": (None, "is not supported; use an unquantised checkpoint"),
    "is_encoder_decoder": (False, "Qwen3 has a decoder alone"),
}
READ = {"architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "layer_types",
        "use_sliding_window", "sliding_window", "quantization_config"}  # fmt: skip
# Keys that are known and not used: nothing that this engine computes depends on them.
UNUSED = {
    "attention_dropout", "hidden_dropout", "max_window_layers", "output_attentions", "use_cache",
    "output_hidden_states", "output_router_logits", "pad_token_id", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "tokenizer_class", "torchscript", "transformers_version", "unsloth_version",
    "unsloth_fixed", "_name_or_path", "_attn_implementation_autoset", "name_or_path", "is_decoder", "id2label",
    "add_cross_attention", "label2id", "task_specific_params", "problem_type", "chunk_size_feed_forward",
    "finetuning_task", "use_bfloat16",
}  # fmt: skip
GENERATION_READ = {"eos_token_id", "do_sample"}
GENERATION_UNUSED = {
    "bos_token_id", "pad_token_id", "max_length", "transformers_version", "_from_model_config", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "use_cache",
    "trust_remote_code",
}  # fmt: skip


class GenerationDefaults(msgspec.Struct, frozen=True):
    """The model's own sampling values, from generation_config.json; None where it names none."""

    temperature: Annotated[float | None, Spec("as in a request", low=0, high=1e6)] = None
    top_k: Annotated[int | None, Spec("as in a request; 0 is off", low=-1, high=MAX_TOKENS)] = None
    top_p: Annotated[float | None, Spec("as in a request", low=0, high=1, above_low=True)] = None
    min_p: Annotated[float | None, Spec("as in a request", low=0, high=1)] = None
    repetition_penalty: Annotated[float | None, Spec("as in a request", low=0, high=1e6, above_low=True)] = None
    max_new_tokens: Annotated[
        int | None, Spec("as in a request, as far as the context reaches", low=1, high=MAX_TOKENS)
    ] = None

    def as_dict(self) -> dict[str, float | int]:
        """The values that are set, by the names of `SamplingParams`."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class Yarn(msgspec.Struct, frozen=True, kw_only=True):
    """rope_parameters of type yarn: Peng et al., "YaRN: Efficient Context Window Extension", 2023."""

    factor: Annotated[float, Spec("how many times the trained length", low=1, high=1e6)]
    original_max_position_embeddings: Annotated[int, Spec("the length that was trained", low=1, high=MAX_TOKENS)]
    attention_factor: Annotated[float | None, Spec("scale of cosines and sines", low=0, high=1e6, above_low=True)] = (
        None
    )
    beta_fast: Annotated[float | None, Spec("rotations above which nothing changes", low=0, high=1e6)] = None
    beta_slow: Annotated[float | None, Spec("rotations below which all is stretched", low=0, high=1e6)] = None
    mscale: Annotated[float | None, Spec("see attention_factor in transformers", low=0, high=1e6)] = None
    mscale_all_dim: Annotated[float | None, Spec("see attention_factor in transformers", low=0, high=1e6)] = None
    truncate: Annotated[bool, Spec("whether the range of dimensions is of whole numbers")] = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One model's shape. `num_experts` is 0 for a dense model.

    dtype: that of the checkpoint; None where config.json names none. has_head: whether it makes logits, as all but some
    embedding models do. runtime/settings/checkpoint.py finds both.
    """

    architecture: str
    vocab_size: Annotated[int, Spec("tokens that have an embedding", low=1, high=MAX_TOKENS)]
    hidden_size: Annotated[int, Spec("width of the residual stream", low=1, high=MAX_SIZE)]
    intermediate_size: Annotated[int, Spec("width of a dense MLP", low=1, high=MAX_SIZE)]
    num_hidden_layers: Annotated[int, Spec("decoder layers", low=1, high=10_000)]
    num_attention_heads: Annotated[int, Spec("query heads", low=1, high=65_536)]
    num_key_value_heads: Annotated[int, Spec("KV heads", unset="as many as query heads", low=1, high=65_536)]
    head_dim: Annotated[
        int, Spec("width of a head, even", unset="128; with experts hidden_size / heads", low=2, high=65_536)
    ]
    max_position_embeddings: Annotated[int, Spec("longest context", low=1, high=MAX_CONTEXT)]
    rms_norm_eps: Annotated[float, Spec("of all norms", low=0, high=1, above_low=True)] = 1e-6
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    quantized: QuantizedForm | None = None
    tie_word_embeddings: Annotated[bool, Spec("whether the head is the embedding")] = False
    has_head: bool = True
    dtype: Annotated[
        str | None,
        Spec("of the checkpoint", unset="the tensors' own", choices=SUPPORTED_DTYPES, aliases=("torch_dtype",)),
    ] = None
    initializer_range: Annotated[float, Spec("of `--load-format dummy`'s weights", low=0, high=1e3)] = 0.02
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: Annotated[int | None, Spec("not used", low=0, high=MAX_TOKENS)] = None
    generation_defaults: GenerationDefaults = GenerationDefaults()
    num_experts: Annotated[int, Spec("experts of a layer", low=1, high=65_536, aliases=("num_local_experts",))] = 0
    num_experts_per_tok: Annotated[int, Spec("experts that a token goes to", low=1, high=65_536)] = 0
    moe_intermediate_size: Annotated[int, Spec("width of an expert", low=1, high=MAX_SIZE)] = 0
    norm_topk_prob: Annotated[bool, Spec("whether chosen experts' weights add up to 1")] = False
    decoder_sparse_step: Annotated[int, Spec("every how many layers has experts", low=1, high=10_000)] = 1
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
        generation = JsonFile.read_if_there(folder / "generation_config.json", ModelConfigError)
        _check_pooling(JsonFile.read_if_there(folder / POOLING, ModelConfigError))
        return _build(JsonFile.read(path, ModelConfigError), generation)

    @property
    def context_limit(self) -> int:
        """The longest context that the positions are made for, in tokens."""
        stretched = 0 if self.yarn is None else int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return min(MAX_CONTEXT, max(self.max_position_embeddings, stretched))

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


MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")


def _build(config: JsonFile, generation: JsonFile) -> ModelConfig:
    architecture = _architecture(config)
    is_moe = architecture == MOE
    _refuse_unsupported(config)
    dense = [name for name in table(ModelConfig) if name not in MOE_FIELDS]
    values = config.take(ModelConfig, None if is_moe else dense)
    heads, hidden = values.get("num_attention_heads", 1), values.get("hidden_size", 1)
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", hidden // heads if is_moe else DEFAULT_HEAD_DIM_DENSE)
    theta, yarn = _rope(config, values.get("max_position_embeddings"))
    vocabulary = values.get("vocab_size", MAX_TOKENS)
    if config.get("quantization_config") is not None:
        described = config.get("quantization_config")
        values["quantized"] = read_form(
            described, lambda problem: config.error("quantization_config", described, problem)
        )
    values |= {"architecture": architecture, "rope_theta": theta, "yarn": yarn}
    values["eos_token_ids"] = _eos_token_ids(vocabulary, config, generation)
    values["generation_defaults"] = _generation_defaults(generation)
    if is_moe:
        values["mlp_only_layers"] = _mlp_only_layers(config)
        missing = next((name for name in MOE_FIELDS[:3] if name not in values), None)
        if missing is not None:
            raise config.missing(missing, "there are no experts without it")
    model = config.make(ModelConfig, values)
    if heads % model.num_key_value_heads:
        raise config.error("num_key_value_heads", model.num_key_value_heads, f"must divide num_attention_heads={heads}")
    if model.head_dim % 2:
        raise config.error("head_dim", model.head_dim, "must be even, rotary embedding turns pairs")
    if is_moe and model.num_experts_per_tok > model.num_experts:
        raise config.error(
            "num_experts_per_tok", model.num_experts_per_tok, f"must not exceed num_experts={model.num_experts}"
        )
    names = {key for name, field in table(ModelConfig).items() for key in (name, *field.spec.aliases)}
    config.warn_of_others(names | READ | UNUSED | FIXED.keys() | {"mlp_only_layers", *table(GenerationDefaults)})
    return model


def _check_pooling(file: JsonFile) -> None:
    """An embedding model's vectors are those of its last token, as Qwen3-Embedding's are, or no vectors of it."""
    mode = file.get("pooling_mode")
    asked = (
        {f"pooling_mode_{mode}"} if mode is not None else {key for key, value in file.values.items() if value is True}
    )
    wrong = sorted(key for key in asked if key.startswith("pooling_mode_") and key != "pooling_mode_lasttoken")
    if wrong:
        raise file.error(wrong[0], True, "is not supported; only the last token is pooled")


def _architecture(config: JsonFile) -> str:
    supported = " or ".join(SUPPORTED_ARCHITECTURES)
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise config.error("architectures", names, f"must be a list of one name, {supported}")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise config.error("architectures", names, f"is not supported; this engine runs {supported}")
    kind = config.get("model_type")
    if kind is not None and kind != MODEL_TYPES[names[0]]:
        raise config.error("model_type", kind, f"must be {MODEL_TYPES[names[0]]!r}, as architectures says")
    return str(names[0])


def _refuse_unsupported(config: JsonFile) -> None:
    for key, (allowed, why) in FIXED.items():
        value = config.get(key)
        if value is not None and (type(value) is bool) != (type(allowed) is bool):
            raise config.error(key, value, f"must be {allowed!r}; {why}" if allowed is not None else why)
        if value is not None and value != allowed:
            raise config.error(key, value, f"is not supported; {why}")
    sliding = config.get("use_sliding_window")
    if sliding is not None and not isinstance(sliding, bool):
        raise config.error("use_sliding_window", sliding, "must be true or false")
    if sliding and config.get("sliding_window") is not None:
        raise config.error(
            "sliding_window", config.get("sliding_window"), "is not supported; set use_sliding_window to false"
        )
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise config.error("layer_types", layer_types, "is not supported; every layer must be full_attention")


def _rope(config: JsonFile, max_position_embeddings: int | None) -> tuple[float, Yarn | None]:
    """Theta and YaRN. Transformers 5 keeps both in `rope_parameters`; 4 has `rope_theta` beside a `rope_scaling`."""
    theta, yarn = config.get("rope_theta"), None
    given = [key for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    if len(given) == 2 and config.get(given[0]) != config.get(given[1]):
        raise config.error(given[1], config.get(given[1]), "differs from rope_parameters; remove one")
    for key in given[:1]:
        rope = config.get(key)
        if not isinstance(rope, dict):
            raise config.error(key, rope, "must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind == "yarn":
            known |= table(Yarn).keys()
            file = config.part(rope)
            values = file.take(Yarn)
            if max_position_embeddings is not None:
                values.setdefault("original_max_position_embeddings", max_position_embeddings)
                values.setdefault("factor", max_position_embeddings / values["original_max_position_embeddings"])
            yarn = file.make(Yarn, values)
            if (yarn.beta_fast or 32) < (yarn.beta_slow or 1):
                raise config.error(key, rope, "must have beta_fast above beta_slow")
        elif kind != "default":
            raise config.error(
                key, rope, f"has rope type {shown(kind)}, which is not supported; only 'default' and 'yarn' are"
            )
        others = [name for name in rope if name not in known] if yarn is not None else []
        if others or rope.get("partial_rotary_factor") not in (None, 1.0):
            raise config.error(key, rope, f"has {(others or ['partial_rotary_factor'])[0]}, which is not supported")
        theta = rope.get("rope_theta", theta)
    theta = 10_000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e30:
        raise config.error("rope_theta", theta, "must be a number above 1")
    return float(theta), yarn


def _eos_token_ids(vocabulary: int, *files: JsonFile) -> tuple[int, ...]:
    """End tokens of both files, in order, once each; generation_config.json often lists more of them."""
    ids: list[int] = []
    for file in files:
        value = file.get("eos_token_id")
        for token in [] if value is None else value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise file.error(
                    "eos_token_id",
                    value,
                    f"must be a token id of the vocabulary, below {vocabulary}, or a list of them",
                )
            if token not in ids:
                ids.append(token)
    return tuple(ids)


def _generation_defaults(generation: JsonFile) -> GenerationDefaults:
    sample = generation.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise generation.error("do_sample", sample, "must be true or false")
    values = generation.take(GenerationDefaults)
    if sample is False:
        # The model asks for greedy decoding; transformers then ignores what only sampling has.
        values = {name: values[name] for name in ("repetition_penalty", "max_new_tokens") if name in values}
        values["temperature"] = 0.0
    generation.warn_of_others(GENERATION_READ | GENERATION_UNUSED | table(GenerationDefaults).keys())
    return GenerationDefaults(**values)


def _mlp_only_layers(config: JsonFile) -> tuple[int, ...]:
    layers = config.get("mlp_only_layers")
    layers = [] if layers is None else layers
    if not isinstance(layers, list) or any(type(layer) is not int or not 0 <= layer < 10_000 for layer in layers):
        raise config.error("mlp_only_layers", layers, "must be a list of layer numbers")
    return tuple(layers)
