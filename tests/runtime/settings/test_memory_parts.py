"""The memory that is planned is the memory that models take: of every published size, at every degree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.tables import QWEN3
from tests.qwen3.harness import DENSE, MOE, compute_of, load_model, make_checkpoint
from vibe_sgl_lite.model_worker.kv_pool import bytes_per_token
from vibe_sgl_lite.model_worker.matrix_formats import keep_as_codes
from vibe_sgl_lite.model_worker.weights import load_dummy_weights
from vibe_sgl_lite.qwen3.checkpoint import load_items, weight_bytes
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.commands.main import main
from vibe_sgl_lite.runtime.errors import ModelConfigError
from vibe_sgl_lite.runtime.settings.memory_parts import rank_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.parallel_degrees import check_parallel_degrees

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SIZES = {name.removeprefix("Qwen3-"): shape for name, shape in QWEN3.items()}
DEGREES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 4), (8, 8), (16, 4)]


def write_config(folder: Path, size: str) -> ModelConfig:
    hidden, intermediate, layers, heads, kv_heads, tied, experts = SIZES[size]
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM"],
        "vocab_size": 151669 if tied else 151936,  # the former, which ranks cannot share evenly, is Qwen3-Embedding's
        "hidden_size": hidden, "intermediate_size": 4 * hidden if experts else intermediate, "head_dim": 128,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 40960, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if experts:
        config |= {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": intermediate}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("most", [4, pytest.param(99, marks=pytest.mark.slow)], ids=["four", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_at_every_degree(tmp_path: Path, size: str, most: int) -> None:
    """Built without memory, on torch's meta device: the last rank's weights have the planned bytes."""
    config, meta = write_config(tmp_path, size), torch.device("meta")
    tried = 0
    for tp, ep in DEGREES:
        try:
            check_parallel_degrees(config, tp, ep)
        except ModelConfigError:
            continue
        if (size == "235B-A22B" and tp < 8 and most == 4) or tried == most:
            continue  # each has thousands of weights: four degrees of each size are enough where time matters
        tried += 1
        group: Any = object()  # never used: nothing here communicates
        split = tp // ep
        parallel = ParallelState(
            rank=tp - 1,
            tp=Group(tp - 1, tp, group),
            ep=Group(ep - 1, ep, group),
            expert_tp=Group(split - 1, split, group),
        )
        model = Qwen3(config, parallel, torch.bfloat16, meta, TorchOperations())
        for item in load_items(model):
            for weight in item.weights:
                weight.install(torch.empty(weight.shape, dtype=weight.dtype, device=meta))
        memory = rank_memory(config, tp=tp, ep=ep, dtype="bfloat16")
        assert memory.weight_bytes == weight_bytes(model), (tp, ep)
        assert memory.kv_token == bytes_per_token(config, tp, torch.bfloat16, int8=False)
        int8 = rank_memory(config, tp=tp, ep=ep, dtype="bfloat16", int8_cache=True)
        assert int8.kv_token == bytes_per_token(config, tp, torch.bfloat16, int8=True)
    assert tried >= 2


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("shape", [DENSE, DENSE | {"tie_word_embeddings": True}, MOE], ids=["dense", "tied", "moe"])
def test_quantised_matrices(tmp_path: Path, shape: dict[str, Any], quantization: str) -> None:
    """Slabs are whole: sizes here are multiples of theirs."""
    sizes = {"intermediate_size": 256, "moe_intermediate_size": 64, "hidden_size": 128}
    if "num_experts" in shape:
        sizes["num_experts"] = 64
    make_checkpoint(tmp_path, shape | sizes)
    model = load_model(
        tmp_path, dtype=torch.bfloat16, compute=compute_of("kernels", torch.bfloat16), quantization=quantization
    )
    memory = rank_memory(model.config, tp=1, ep=1, dtype="bfloat16", quantization=quantization)
    assert memory.weight_bytes == weight_bytes(model)


@pytest.mark.parametrize("form", [AWQ, FP8, None], ids=["awq", "fp8", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_codes_on_a_gpu(tmp_path: Path, form: dict[str, Any] | None, tied: bool) -> None:
    """They stay what they are, also of a checkpoint in bf16 that is kept in 4 bits; sizes here are whole tiles."""
    shape = DENSE | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 384, "tie_word_embeddings": tied}
    shape |= {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = shape | ({} if form is None else {"quantization_config": form})
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen3ForCausalLM"]}))
    config = ModelConfig.from_folder(tmp_path)
    model = Qwen3(config, ParallelState(), torch.bfloat16, torch.device("cpu"), TorchOperations())
    model.head.weight.keep_as(PlainMatrix)  # as a GPU would
    keep_as_codes(model, everything=form is None)
    load_dummy_weights(model, 0, lambda done, total: None)
    quantization = "int4" if form is None else "none"
    memory = rank_memory(config, tp=1, ep=1, dtype="bfloat16", quantization=quantization, gpu=True)
    assert memory.weight_bytes == weight_bytes(model)


@pytest.mark.parametrize(("tp", "ep", "stay"), [(1, 1, True), (2, 1, True), (4, 1, False), (4, 4, True)])
def test_experts_in_fp8_on_a_gpu(tmp_path: Path, tp: int, ep: int, *, stay: bool) -> None:
    """Stay codes in parts of whole blocks; here a part of 4 has half of one."""
    shape = MOE | {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 384, "quantization_config": FP8}
    shape |= {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["Qwen3MoeForCausalLM"]}))
    config = ModelConfig.from_folder(tmp_path)
    nobody: Any = object()  # nothing here communicates
    groups = [Group(size - 1, size, nobody if size > 1 else None) for size in (tp, ep, tp // ep)]
    parallel = ParallelState(tp - 1, *groups)
    model = Qwen3(config, parallel, torch.bfloat16, torch.device("cpu"), TorchOperations())
    model.head.weight.keep_as(PlainMatrix)  # as a GPU would
    keep_as_codes(model, everything=False)
    load_dummy_weights(model, 0, lambda done, total: None)
    weights = [weight for item in load_items(model) for weight in item.weights if isinstance(weight, ExpertWeight)]
    assert [weight.stack is not None for weight in weights] == [stay] * len(weights)
    memory = rank_memory(config, tp=tp, ep=ep, dtype="bfloat16", gpu=True)
    assert memory.weights["experts"] == sum(weight.nbytes for weight in weights)


def test_the_command_knows_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, "8B")
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": AWQ}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device, weights in (("cpu", "15.256"), ("cuda", "5.755")):
        arguments = ["--model-path", str(tmp_path), "--load-format", "dummy", "--device", device]
        assert main(["plan", *arguments]) == 0
        said = capsys.readouterr().out
        assert weights in said, said
        assert ("awq" in said) == (device == "cuda")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, "0.6B")
    assert main(["plan", "--model-path", str(tmp_path), "--tp", "4", "--load-format", "dummy"]) == 0
    said = capsys.readouterr().out
    for line in (
        "4 ranks (ep 1), matrices in bfloat16",
        "MLPs",
        "weights",
        "of 40960 tokens (one whole context), 28672",
    ):
        assert line in said
    assert main(["plan", "--model-path", str(tmp_path), "--tp", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: --tp 3 does not fit")
