"""Checkpoints of the published quantised forms on the GPU backend: logits as transformers has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model_worker.test_quantized_files import make
from tests.qwen3.harness import PagedRun, Row, load_model, random_tokens, reference_logits
from vibe_sgl_lite.model_worker.compute import GpuSetup, gpu_compute
from vibe_sgl_lite.model_worker.gpu.grouped_layers import GroupedLayers
from vibe_sgl_lite.model_worker.gpu.grouped_matrix import GroupedMatrix
from vibe_sgl_lite.model_worker.gpu.layers import plan_layers
from vibe_sgl_lite.model_worker.matrix_formats import keep_as_codes
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU = torch.device("cpu")


def model_of(folder: Path, parallel: ParallelState | None = None, *, everything: bool = False) -> Qwen3:
    config = settle(ModelConfig.from_folder(folder), folder)
    compute = gpu_compute(CPU, GpuSetup(2, config.vocab_size, 4, 0))
    model = Qwen3(config, parallel or ParallelState(), torch.float32, CPU, compute.operations)
    keep_as_codes(model, everything=everything)
    load_weights(model, folder)
    return model


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("form", ["awq", "gptq-act-order", "fp8"])
def test_logits(tmp_path: Path, form: str) -> None:
    """A chunk, then two rows that decode: the layers one by one, and five kernels each."""
    folder = make(tmp_path, form)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    model = model_of(folder)
    layer = model.layers[0]
    assert isinstance(layer.attention.qkv.weight.matrix, GroupedMatrix)
    run = PagedRun(model, compute=gpu_compute(CPU, GpuSetup(2, model.config.vocab_size, 4, 0)))
    plan_layers(model, run.backend)  # type: ignore[arg-type]  # the GPU's
    assert isinstance(model.all_layers, GroupedLayers)
    tokens = [random_tokens(7), random_tokens(4, seed=1)]
    rows = [Row(part) for part in tokens]
    expected = [reference_logits(reference, part) for part in tokens]
    chunks = run.step([(rows[0], 6), (rows[1], 3)])
    decoded = run.step([(rows[0], 1), (rows[1], 1)])
    torch.testing.assert_close(chunks, torch.cat([expected[0][:6], expected[1][:3]]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded, torch.stack([expected[0][6], expected[1][3]]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("form", ["awq", "gptq", "gptq-act-order", "fp8", "gptq-int8"])
def test_ranks_keep_their_own_slices(tmp_path: Path, form: str) -> None:
    """What cannot be cut at a bound of groups is plain, and right; so are codes of 8 bits with zeros."""
    folder, tp = make(tmp_path, form), 2
    for rank in range(tp):
        share: Any = Group(rank, tp, object())  # type: ignore[arg-type]  # never used: nothing here communicates
        state = ParallelState(rank=rank, tp=share, ep=Group(), expert_tp=share)
        plain, model = load_model(tmp_path / "plain", parallel=state), model_of(folder, state)
        for ours, theirs in zip(model.layers, plain.layers, strict=True):
            assert isinstance(ours.feed_forward, MLP)
            assert isinstance(theirs.feed_forward, MLP)
            for name in ("gate_up", "down"):
                matrix, expected = getattr(ours.feed_forward, name).weight, getattr(theirs.feed_forward, name).weight
                whole = form in ("awq", "gptq", "fp8") or (form == "gptq-act-order" and name == "gate_up")
                assert isinstance(matrix.matrix, GroupedMatrix) == whole, (name, type(matrix.matrix))
                x = torch.randn(3, matrix.shape[1])
                torch.testing.assert_close(matrix.multiply(x), expected.multiply(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the interpreter
def test_a_plain_checkpoint_is_kept_in_four_bits_if_that_is_asked_for(tmp_path: Path) -> None:
    make(tmp_path, "awq")
    model = model_of(tmp_path / "plain", everything=True)
    for weight in (model.head.weight, model.layers[0].attention.output.weight):
        assert isinstance(weight.matrix, GroupedMatrix)
        assert weight.matrix.codes.bits == 4
