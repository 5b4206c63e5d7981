"""ModelConfig reads what transformers writes, old and new keys, and refuses by field what the engine cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest

from vibe_sgl_lite.runtime.errors import ModelConfigError, UserError
from vibe_sgl_lite.runtime.settings.model_config import (
    GenerationDefaults,
    ModelConfig,
    Yarn,
)

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "eos_token_id": 7,
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_reads_a_dense_config(tmp_path: Path) -> None:
    config = read(tmp_path, DENSE, {"eos_token_id": [9, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.head_dim, config.rope_theta, config.dtype) == (16, 1_000_000.0, "bfloat16")
    assert config.eos_token_ids == (7, 9)
    assert config.generation_defaults == GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert not config.is_moe


def test_new_keys_mean_the_same_as_old_ones(tmp_path: Path) -> None:
    new = {key: value for key, value in MOE.items() if key not in ("rope_theta", "torch_dtype", "num_experts")}
    new |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "dtype": "bfloat16",
        "num_local_experts": 8,
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    assert read(tmp_path / "old", MOE) == read(tmp_path / "new", new)


@pytest.mark.parametrize("architecture", ["Qwen3Config", "Qwen3MoeConfig"])
def test_reads_what_transformers_saves(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, architecture)(
        vocab_size=100, num_key_value_heads=4, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    theirs.architectures = [architecture.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_folder(tmp_path)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.num_key_value_heads, ours.head_dim, ours.rope_theta) == (4, 32, 5e5)
    if ours.is_moe:
        assert ours.num_experts == theirs.num_experts
        assert ours.moe_intermediate_size == theirs.moe_intermediate_size


def test_which_layers_have_experts(tmp_path: Path) -> None:
    config = read(tmp_path, MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [config.layer_is_moe(layer) for layer in range(4)] == [False, True, False, False]
    assert config.is_moe
    assert not read(tmp_path, MOE | {"mlp_only_layers": [0, 1, 2, 3]}).is_moe


def test_greedy_generation_config_ignores_its_sampling_values(tmp_path: Path) -> None:
    config = read(tmp_path, DENSE, {"do_sample": False, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1})
    assert config.generation_defaults == GenerationDefaults(temperature=0.0, repetition_penalty=1.1)


def test_unset_defaults_are_left_out_and_a_top_k_of_zero_stays(tmp_path: Path) -> None:
    assert read(tmp_path, DENSE).generation_defaults.as_dict() == {}
    assert read(tmp_path, DENSE, {"top_k": 0, "min_p": 0.1}).generation_defaults.as_dict() == {
        "top_k": 0,
        "min_p": 0.1,
    }


@pytest.mark.parametrize(
    ("generation", "names"),
    [
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"temperature": "warm"}, ["temperature", "warm"]),
        ({"top_k": 2.5}, ["top_k", "2.5"]),
        ({"do_sample": "yes"}, ["do_sample", "yes"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"max_new_tokens": 10**30}, ["max_new_tokens", "1000000"]),
        ({"eos_token_id": 512}, ["eos_token_id", "512"]),
    ],
)
def test_refuses_generation_values_by_field(tmp_path: Path, generation: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, DENSE, generation)
    for name in ["generation_config.json", *names]:
        assert name in str(caught.value)


def test_the_models_own_max_new_tokens(tmp_path: Path) -> None:
    for sample in (True, False):
        defaults = read(tmp_path, DENSE, {"do_sample": sample, "max_new_tokens": 2048}).generation_defaults
        assert defaults.as_dict()["max_new_tokens"] == 2048


def test_what_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, DENSE | {"use_cache": True, "attention_dropout": 0.0}, {"max_length": 20, "do_sample": True})
    assert caplog.text == ""
    read(tmp_path, DENSE | {"scale_emb": 12}, {"num_beams": 4, "temperature": 1.0})
    assert "config.json: not known and not used: scale_emb" in caplog.text
    assert "generation_config.json: not known and not used: num_beams" in caplog.text


def test_yarn(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, DENSE | {"rope_scaling": scaling, "max_position_embeddings": 40960})
    assert config.yarn == Yarn(factor=4.0, original_max_position_embeddings=32768)
    assert config.context_limit == 131072
    new = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2}
    config = read(tmp_path, DENSE | {"rope_parameters": new, "rope_theta": None})
    assert config.yarn == Yarn(factor=2.0, original_max_position_embeddings=1024)
    assert (config.rope_theta, config.context_limit) == (1e6, 2048)


def test_kv_bytes(tmp_path: Path) -> None:
    config = read(tmp_path, DENSE)
    assert config.kv_bytes_per_token(tp_size=1, element_bytes=2) == 2 * 4 * 2 * 16 * 2
    assert config.kv_bytes_per_token(tp_size=8, element_bytes=2) == 2 * 4 * 1 * 16 * 2
    assert config.kv_bytes_per_token(tp_size=1, element_bytes=1, scale_bytes=4) == 2 * 4 * 2 * (16 + 4)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None}, ["architectures", "None"]),
        ({"auto_map": {"AutoModel": "x.py"}}, ["auto_map", "x.py", "never run"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "quant_method"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ["rope_scaling", "dynamic"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, ["factor", "nan"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "short_factor": [1]}}, ["short_factor"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 9}}, ["beta_fast"]),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "linear"}}, ["rope_scaling", "differs"]),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, ["rope_parameters", "yarn"]),
        ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
        ({"rope_theta": float("inf")}, ["rope_theta", "inf"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "1e-6"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0"]),
        ({"hidden_size": 10**400}, ["hidden_size", "1048576"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "10000"]),
        ({"model_type": "qwen2"}, ["model_type", "qwen2", "qwen3"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"hidden_act": False}, ["hidden_act", "False"]),
        ({"attention_bias": 0}, ["attention_bias", "0"]),
        ({"layer_types": 3}, ["layer_types", "3"]),
        ({"use_sliding_window": "no"}, ["use_sliding_window", "no"]),
        ({"architectures": [["Qwen3ForCausalLM"]]}, ["architectures"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters", "linear"]),
        ({"use_sliding_window": True, "sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"torch_dtype": "int8"}, ["torch_dtype", "int8", "bfloat16"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "8"]),
        ({"vocab_size": -1}, ["vocab_size", "-1"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "0"]),
        ({"rope_theta": "big"}, ["rope_theta", "big"]),
        ({"eos_token_id": ["x"]}, ["eos_token_id", "x"]),
        ({"eos_token_id": [7, 10**6]}, ["eos_token_id", "1000000", "vocabulary"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "1"]),
    ],
)
def test_refuses_by_field_and_value(tmp_path: Path, change: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, DENSE | change)
    for name in ["config.json", *names]:
        assert name in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8"]),
        ({"mlp_only_layers": "all"}, ["mlp_only_layers", "all"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size", "0"]),
    ],
)
def test_refuses_bad_expert_fields(tmp_path: Path, change: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, MOE | change)
    for name in names:
        assert name in str(caught.value)


def test_refuses_bad_generation_values(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"generation_config\.json: top_p=1\.5 must be above 0 and at most 1"):
        read(tmp_path, DENSE, {"top_p": 1.5})


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match="does not exist"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"{\xff")
    with pytest.raises(ModelConfigError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelConfigError, match="must hold a JSON object, not list"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["2", "1e-6", "-3.5", "true", "null", "NaN", "", " "])
def test_texts_that_look_like_other_values_are_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, DENSE | {"num_hidden_layers": text})
    assert f'num_hidden_layers="{text}" must be a whole number' in str(caught.value)


@pytest.mark.parametrize(
    ("pooling", "refused"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, None),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}, "pooling_mode_mean_tokens"),
        ({"pooling_mode": "cls"}, "pooling_mode_cls"),
    ],
)
def test_embeddings_of_another_pooling_are_refused(
    tmp_path: Path, pooling: dict[str, Any], refused: str | None
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if refused is None:
        read(tmp_path, DENSE)
    else:
        with pytest.raises(ModelConfigError, match=f"1_Pooling/config.json: {refused}=True is not supported"):
            read(tmp_path, DENSE)
