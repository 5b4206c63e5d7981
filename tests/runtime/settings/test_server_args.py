"""Settings: every field described, checked by type and range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, ServerArgs, flag_name, make_args


def test_every_field_is_described_and_nothing_else() -> None:
    assert list(FLAGS) == [field.name for field in msgspec.structs.fields(ServerArgs)]


def test_every_default_of_none_says_what_it_stands_for() -> None:
    for field in msgspec.structs.fields(ServerArgs):
        assert bool(FLAGS[field.name].spec.unset) == (field.default is None), field.name


def test_defaults_are_valid() -> None:
    assert make_args({}) == ServerArgs()


def test_round_trip_through_json_as_children_get_it() -> None:
    args = make_args(
        {"tp": 4, "ep": 2, "moe-dispatch": "all-to-all", "step-timeout": 5, "address": "tcp://127.0.0.1:0"}
    )
    assert msgspec.json.decode(msgspec.json.encode(args), type=ServerArgs) == args


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tp", 0, "at least 1 and at most 1024 (ranks)"),
        ("tp", "2", "a whole number"),
        ("tp", True, "a whole number"),
        ("tp", None, "a whole number"),
        ("page_size", 1.5, "a whole number"),
        ("page_size", 5000, "at most 4096 (tokens)"),
        ("context_length", 1, "at least 2"),
        ("max_total_tokens", -1, "at least 1"),
        ("mem_fraction_static", 0.0, "above 0 and at most 1"),
        ("mem_fraction_static", 1.01, "at most 1"),
        ("mem_fraction_static", float("nan"), "above 0"),
        ("step_timeout", float("inf"), "above 0 and at most 86400 (seconds)"),
        ("step_timeout", "x", "a number"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("disable_radix_cache", 1, "true or false"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("dtype", "float64", "one of auto, float32, bfloat16, float16"),
        ("schedule_policy", "random", "one of fcfs, lpm, dfs-weight, priority"),
        ("kv_cache_dtype", "int4", "one of auto, int8, fp8"),
        ("moe_dispatch", "all_reduce", "one of all-reduce, all-to-all"),
        ("trace", "", "must not be empty"),
        ("load_format", "pickle", "one of auto, dummy"),
        ("log_level", "INFO", "one of debug, info, warning, error"),
        ("model_path", "", "must not be empty"),
        ("model_path", None, "a text"),
        ("tokenizer_path", "a\0b", "zero byte"),
        ("name", "../x", "letters, digits"),
        ("address", "tcp://0.0.0.0:1", "beyond loopback"),
    ],
)
def test_a_bad_value_is_refused_with_flag_value_and_limit(field: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerArgs(**{field: value})
    message = str(error.value)
    assert error.value.field == field
    assert flag_name(field) in message
    assert str(value) in message or repr(value) in message
    assert says in message


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("host", ["127.0.0.1", "localhost", "::1"], ["local host", "a\nb", "h\u00f6st"]),
        ("api_key", ["secret", "a-b_c~!"], ["a b", "a\nb", "caf\u00e9", " x"]),
        (
            "cors_origin",
            ["https://a.example", "http://localhost:8080"],
            ["*", "https://a/", "a.example", "http://a\r\nx: y"],
        ),
        ("metrics_prefix", ["vllm:", "x_", "sglang:"], ["a b", "9", "a{", "a-b", "a\n"]),
    ],
)
def test_texts_that_travel_in_headers_and_names(field: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert getattr(make_args({field: text}), field) == text
    for text in bad:
        with pytest.raises(ConfigError, match=f"^--{field.replace('_', '-')} ") as caught:
            make_args({field: text, "insecure": True})
        assert caught.value.field == field
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"nnodes": 2, "tp": 3}, "nnodes", "--nnodes 2 does not divide --tp 3, the ranks of all nodes; possible: 1, 3"),
        ({"nnodes": 2, "tp": 2}, "nnodes", "--nnodes 2 needs --dist-init-addr HOST:PORT"),
        ({"node_rank": 1}, "node_rank", "--node-rank 1 must be below --nnodes 1"),
        ({"draft_model_path": "/x", "speculative_algorithm": "ngram"}, "draft_model_path", "ngram has none"),
        ({"speculative_algorithm": "draft"}, "draft_model_path", "draft needs the model"),
        ({"deterministic": True, "tp": 4}, "deterministic", "--deterministic is for at most --tp 2"),
        ({"deterministic": True, "device": "cuda", "tp": 2}, "deterministic", "on a GPU --tp 1"),
        ({"deterministic": True, "quantization": "int4"}, "deterministic", "not for --quantization int4"),
        ({"dist_init_addr": "10.0.0.1:1"}, "dist_init_addr", "is for several nodes"),
        ({"nnodes": 2, "tp": 2, "dist_init_addr": "10.0.0.1"}, "dist_init_addr", "must be HOST:PORT"),
        ({"nnodes": 2, "tp": 2, "dist_init_addr": "h:70000"}, "dist_init_addr", "must be HOST:PORT"),
    ],
)
def test_nodes_must_agree(values: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        ServerArgs(**values)
    assert error.value.field == field


def test_ranks_of_a_node() -> None:
    assert ServerArgs(tp=3).local_ranks == range(3)
    assert ServerArgs(tp=4, nnodes=2, node_rank=1, dist_init_addr="[::1]:29500").local_ranks == range(2, 4)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": torch.float32}, {"dtype": "float32"}),
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "fp8"}),
        (dict.fromkeys(FLAGS), {}),
    ],
    ids=str,
)
def test_values_that_other_engines_have_for_the_same(given: dict[str, Any], taken: dict[str, Any]) -> None:
    assert make_args(given) == ServerArgs(**taken)


def test_a_checkpoints_own_form_need_not_be_named() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization awq must be one of none, int8, int4, fp8; the form of a checkpoint"
    ):
        make_args({"quantization": "awq"})


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"page_sise is not a setting; did you mean page_size\?"):
        make_args({"page_sise": 1})
    with pytest.raises(ConfigError, match="zzz is not a setting; known: model_path, "):
        make_args({"zzz": 1})
    with pytest.raises(ConfigError, match="set twice"):
        make_args({"page-size": 1, "page_size": 2})


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"tensor_parallel_size": 2}, "tp", 2),
        ({"tp-size": 2}, "tp", 2),
        ({"max_model_len": 100}, "context_length", 100),
        ({"model": "/m"}, "model_path", "/m"),
        ({"max_num_seqs": 3}, "max_running_requests", 3),
    ],
)
def test_names_that_other_engines_have_for_the_same(values: dict[str, Any], field: str, value: object) -> None:
    assert getattr(make_args(values), field) == value
    with pytest.raises(ConfigError, match="set twice"):
        make_args({**values, field: value})


def test_close_relatives_are_named_but_not_taken() -> None:
    with pytest.raises(
        ConfigError, match="gpu-memory-utilization is not a setting; mem_fraction_static is the nearest"
    ):
        make_args({"gpu-memory-utilization": 0.5})


def test_aliases_are_nobodys_names() -> None:
    aliases = [alias for field in FLAGS.values() for alias in (*field.spec.aliases, *field.spec.like)]
    assert len(set(aliases) | set(FLAGS)) == len(aliases) + len(FLAGS)


def test_a_path_is_a_path() -> None:
    assert ServerArgs(model_path=Path("/m"), trace=Path("t")) == ServerArgs(model_path="/m", trace="t")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--name"):
        ServerArgs(name=Path("x"))  # type: ignore[arg-type]


def test_args_are_frozen() -> None:
    with pytest.raises(AttributeError):
        ServerArgs().tp = 2  # type: ignore[misc]
