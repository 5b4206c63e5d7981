"""Every tensor in a checkpoint is accounted for, as transformers accounts for it, and never more kindly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.qwen3.harness import DENSE, MOE, PagedRun, Row, load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite.qwen3.checkpoint import load_items
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import UserError, WeightsError
from vibe_sgl_lite.runtime.settings.checkpoint import find_tensors, settle, tensor_shapes
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED = DENSE | {"tie_word_embeddings": True}
Tensors = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    """Rewrite the one weights file after `edit` has changed its tensors."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def fails(folder: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        settle(config or ModelConfig.from_folder(folder), folder)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def runs_as_transformers(folder: Path) -> None:
    """Our model and transformers', both loaded from `folder`, say the same."""
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(20)
    logits = PagedRun(load_model(folder)).step([(Row(tokens), 20)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [DENSE, TIED, MOE | {"mlp_only_layers": [1]}], ids=["dense", "tied", "moe"])
def test_the_table_is_what_transformers_saves_and_what_the_model_reads(tmp_path: Path, shape: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, shape)
    config = ModelConfig.from_folder(tmp_path)
    shapes = tensor_shapes(config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / FILE).items()}
    model = Qwen3(config, ParallelState(), torch.float32, torch.device("meta"), TorchOperations())
    assert shapes == {part.name: part.shape for item in load_items(model) for part in item.parts}


@pytest.mark.parametrize("shape", [DENSE, TIED], ids=["head", "tied"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: "model." + name.removeprefix("model."),
        lambda name: name.removeprefix("model.") if "layers.0" in name else name,
    ],
    ids=["none", "all", "some"],
)
def test_names_with_and_without_the_prefix(tmp_path: Path, rename: Callable[[str], str], shape: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, shape)

    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    change(tmp_path, edit)
    runs_as_transformers(tmp_path)


def test_a_stale_index_counts_for_its_files_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {name: files[(files.index(file) + 1) % len(files)] for name, file in index["weight_map"].items()}
    index["weight_map"] = {"model.gone.weight": files[0], **moved}
    (tmp_path / INDEX).write_text(json.dumps(index))
    runs_as_transformers(tmp_path)


def test_a_single_file_wins_over_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, DENSE, seed=1, max_shard_size="50KB")
    make_checkpoint(tmp_path / "single", DENSE, seed=2)
    shutil.move(tmp_path / "single" / FILE, tmp_path / FILE)
    runs_as_transformers(tmp_path)
    settle(ModelConfig.from_folder(tmp_path), tmp_path)
    assert "not read: model-00001-of-" in caplog.text


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    right = index["weight_map"]["model.norm.weight"]
    other = next(name for name in sorted(index["weight_map"].values()) if name != right)
    tensors = load_file(tmp_path / other)
    save_file(tensors | {"model.norm.weight": torch.zeros(64)}, tmp_path / other, metadata={"format": "pt"})
    assert find_tensors(ModelConfig.from_folder(tmp_path), tmp_path)["model.norm.weight"].path.name == right
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = fails(tmp_path)
    for part in (right, other, "model.norm.weight"):
        assert part in message


def test_a_heads_own_values_count_beside_tie_word_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, TIED)
    torch.manual_seed(1)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(256, 64)}))
    assert not settle(ModelConfig.from_folder(tmp_path), tmp_path).tie_word_embeddings
    assert "tie_word_embeddings" in caplog.text
    assert "lm_head.weight" in caplog.text
    runs_as_transformers(tmp_path)


@pytest.mark.parametrize("shape", [DENSE, TIED], ids=["a head of its own", "tied"])
def test_a_model_saved_from_below_its_head_has_none_unless_it_is_tied(tmp_path: Path, shape: dict[str, Any]) -> None:
    """As Qwen3-Embedding-8B and -0.6B are published."""
    make_checkpoint(tmp_path, shape)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensor = tensors.pop(name)
            if name != "lm_head.weight":
                tensors[name.removeprefix("model.")] = tensor

    change(tmp_path, cut)
    config = settle(ModelConfig.from_folder(tmp_path), tmp_path)
    assert (config.has_head, config.tie_word_embeddings) == (shape is TIED, True)
    load_model(tmp_path)


def test_a_lost_head_is_missed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "no file has the tensor lm_head.weight" in fails(tmp_path)


def test_a_tied_copy_that_is_the_embedding_is_needless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, TIED)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert settle(ModelConfig.from_folder(tmp_path), tmp_path).tie_word_embeddings
    assert caplog.text == ""
    runs_as_transformers(tmp_path)
    change(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))  # a tied head may be the only copy
    assert settle(ModelConfig.from_folder(tmp_path), tmp_path).tie_word_embeddings
    runs_as_transformers(tmp_path)


def test_rotary_buffers_of_old_files_are_needless(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    names = ("model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    change(tmp_path, lambda t: t.update({name: torch.ones(16) for name in names}))
    runs_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["model.layers.2.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"], ["2 of layers", "=2"]),
        (["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"], ["2 biases", "q_proj.bias"]),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], ["1 of an adapter", "lora_A"]),
        (["model.layers.0.mlp.up_proj.weight_scale"], ["1 of a quantised checkpoint", "weight_scale"]),
        (["model.layers.0.self_attn.k_scale"], ["1 of a quantised checkpoint", "k_scale"]),
        (["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.g_idx"], ["2 of a quantised", "g_idx"]),
        (["visual.patch_embed.weight"], ["1 of names", "visual.patch_embed.weight"]),
        (["score.weight", "model.layers.0.self_attn.q_proj.bias"], ["2 tensors", "1 biases", "score.weight"]),
    ],
)  # fmt: skip
def test_tensors_without_a_place_are_refused_by_kind_name_and_count(
    tmp_path: Path, extra: list[str], words: list[str]
) -> None:
    make_checkpoint(tmp_path, DENSE)
    change(tmp_path, lambda t: t.update({name: torch.zeros(4) for name in extra}))
    message = fails(tmp_path)
    for word in words:
        assert word in message


def test_experts_beyond_the_configs_number(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, MOE)
    config = json.loads((tmp_path / "config.json").read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 6}))
    message = fails(tmp_path)
    assert "12 of experts beyond num_experts=6" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("scales", [True, False])
def test_quantised_types_without_a_description(tmp_path: Path, dtype: torch.dtype, scales: bool) -> None:
    make_checkpoint(tmp_path, DENSE)

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "proj" in name]:
            tensors[name] = tensors[name].to(dtype)
            if scales:
                tensors[f"{name}_scale"] = torch.ones(1)

    change(tmp_path, edit)
    message = fails(tmp_path)
    assert "quantization_config" in message
    assert "down_proj.weight" in message
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8"}
    assert stored.get(dtype, "I32") in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_dtype_in_the_config_the_tensors_own(tmp_path: Path, dtype: torch.dtype) -> None:
    make_checkpoint(tmp_path, DENSE)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    change(tmp_path, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    ours = settle(ModelConfig.from_folder(tmp_path), tmp_path).dtype
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype
    assert ours == str(theirs).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_no_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    (tmp_path / FILE).unlink()
    assert "no *.safetensors file" in fails(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pytorch_model.bin" in fails(tmp_path)
    assert "never read" in fails(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_beside_the_weights(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, DENSE)
    (tmp_path / name).write_bytes(b"{}")
    assert name in fails(tmp_path)


def test_truncated_and_garbage_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    path = tmp_path / FILE
    whole = path.read_bytes()
    bracket = len(b"{}").to_bytes(8, "little")
    nested = b"[" * 100_000
    for content in (
        whole[:-100], whole[:20], whole + b"0", b"", b"\xff" * 64, bracket + b"[]", bracket + b"{]",
        len(nested).to_bytes(8, "little") + nested,
        (2**63).to_bytes(8, "little") + b"{}",
    ):  # fmt: skip
        path.write_bytes(content)
        message = fails(tmp_path)
        assert "model.safetensors is not a whole safetensors file" in message
        assert "download" in message


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, {"dtype": "F32", "shape": [64]}, {"dtype": "F31", "shape": [64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 255]},
        {"dtype": "F32", "shape": [-64], "data_offsets": [0, -256]},
        {"dtype": "F32", "shape": [64.0], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": "64", "data_offsets": [0, 256]},
        {"dtype": ["F32"], "shape": [64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [10**30, 10**30 + 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [4, 260]},
    ],
)  # fmt: skip
def test_headers_that_make_no_sense(tmp_path: Path, entry: Any) -> None:
    make_checkpoint(tmp_path, DENSE)
    header = json.dumps({"model.norm.weight": entry}).encode()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    assert "model.safetensors is not a whole safetensors file" in fails(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in fails(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff", b"",
        b'{"weight_map": {"a": "../real/model.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": ""}}', b'{"weight_map": {"a": "x\\ny"}}',
        b'{"weight_map": {"a": "' + b"a" * 10_000 + b'"}}', b'{"weight_map": {"a": "x\\u0000y"}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_index(tmp_path: Path, content: bytes) -> None:
    make_checkpoint(tmp_path, DENSE, max_shard_size="50KB")
    (tmp_path / INDEX).write_bytes(content)
    assert INDEX in fails(tmp_path)


def test_missing_tensors_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    message = fails(tmp_path)
    assert "model.layers.2.input_layernorm.weight and 10 more" in message
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    message = fails(tmp_path)
    assert "model.layers.0.mlp.gate_proj.weight" in message
    assert "[96, 64]" in message
    assert "[100, 64]" in message
