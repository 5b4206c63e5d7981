"""Published quantised forms: logits as transformers has them with the plain values, on every rank, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.qwen3.harness import (
    DENSE,
    MOE,
    PagedRun,
    Row,
    compute_of,
    load_model,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from tests.qwen3.quantised import FORMS, make_quantised
from tests.runtime.settings.test_model_config import DENSE as PLAIN_CONFIG
from tests.runtime.settings.test_model_config import read
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ModelConfigError, WeightsError
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

# More than one block of 128, not all of them whole.
SHAPES: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"intermediate_size": 320, "hidden_size": 192},
    "moe": MOE | {"moe_intermediate_size": 64},
}


def make(tmp_path: Path, form: str, shape: str = "dense") -> Path:
    make_checkpoint(tmp_path / "source", SHAPES[shape])
    make_quantised(form, tmp_path / "source", tmp_path / "quantised", tmp_path / "plain")
    return tmp_path / "quantised"


@pytest.mark.parametrize(("form", "shape"), [*((form, "dense") for form in FORMS), ("fp8", "moe"), ("awq", "moe")])
def test_logits(tmp_path: Path, form: str, shape: str) -> None:
    folder = make(tmp_path, form, shape)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokens = random_tokens(20)
    logits = PagedRun(load_model(folder)).step([(Row(tokens), 20)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "quantization"), [("fp8", "none"), ("fp8", "int8"), ("awq", "int4"), ("gptq", "int4")]
)
def test_they_can_be_kept_in_the_kernels_formats(tmp_path: Path, form: str, quantization: str) -> None:
    """The same bits as the plain checkpoint in that format."""
    folder = make(tmp_path, form)
    tokens = random_tokens(20)
    logits = [
        PagedRun(load_model(path, compute=compute_of("kernels"), quantization=quantization)).step([(Row(tokens), 20)])
        for path in (folder, tmp_path / "plain")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_read_their_own_slices(tmp_path: Path, form: str) -> None:
    folder, tp = make(tmp_path, form), 4
    config, group = ModelConfig.from_folder(folder), object()

    def load(path: Path, rank: int, size: int) -> Qwen3:
        share: Any = Group(rank, size, group)  # type: ignore[arg-type]  # never used: nothing here communicates
        state = ParallelState(rank=rank, tp=share, ep=Group(), expert_tp=share)
        shape = config if path == folder else ModelConfig.from_folder(path)
        model = Qwen3(shape, state, torch.float16, torch.device("cpu"), TorchOperations())
        load_weights(model, path)
        return model

    def parts(model: Qwen3) -> list[torch.Tensor]:
        layer = model.layers[1]
        assert isinstance(layer.feed_forward, MLP)
        mlp = layer.feed_forward
        weights = (layer.attention.qkv.weight, layer.attention.output.weight, mlp.gate_up.weight, mlp.down.weight)
        return [weight.tensor for weight in weights]

    for rank in range(tp):
        for ours, plain in zip(parts(load(folder, rank, tp)), parts(load(tmp_path / "plain", rank, tp)), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        ("fp8", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("fp8", {"quant_method": ["fp8"]}, "not supported"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme=static"),
        ("fp8", {"weight_block_size": [64, 64]}, "weight_block_size"),
        ("fp8", {"weight_block_size": None}, "weight_block_size"),
        ("awq", {"bits": 3}, "bits=3"),
        ("awq", {"version": "gemv"}, "version=gemv"),
        ("awq", {"zero_point": False}, "zero_point"),
        ("gptq", {"group_size": -1}, "group_size=-1"),
        ("gptq", {"bits": True}, "bits=True"),
        ("gptq", {"dynamic": {"x": 1}}, "dynamic"),
        ("gptq", {"lm_head": True}, "lm_head"),
        ("gptq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path: Path, form: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelConfigError, match="quantization_config") as error:
        read(tmp_path, PLAIN_CONFIG | {"quantization_config": FORMS[form] | change})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "suffix", "says"),
    [
        ("fp8", "weight_scale_inv", "no file has the tensor"),
        ("awq", "qzeros", "no file has the tensor"),
        ("gptq", "g_idx", "no file has the tensor"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, form: str, suffix: str, says: str) -> None:
    folder = make(tmp_path, form)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    name = name if name in tensors else f"model.layers.1.mlp.up_proj.weight.{suffix}"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=says) as error:
        settle(ModelConfig.from_folder(folder), folder)
    assert name in str(error.value)


def test_groups_that_do_not_fit_and_indices_beyond_them(tmp_path: Path) -> None:
    folder = make(tmp_path, "gptq")
    change = load_file(folder / "model.safetensors")
    change["model.layers.0.mlp.up_proj.g_idx"][3] = 99
    save_file(change, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.up_proj: g_idx has groups beyond"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="192 inputs are no whole groups of 128"):
        settle(ModelConfig.from_folder(folder), folder)
