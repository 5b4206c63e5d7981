"""Weights that are loaded over others, in place: as a fresh start has them, in every format, at the same addresses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from vibe_sgl_lite.model_worker.compute import choose_compute, kernel_compute, torch_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
CPU = torch.device("cpu")


def make_runner(folder: Path, dtype: torch.dtype, quantization: str, *, plain: bool = False) -> ModelRunner:
    config = ModelConfig.from_folder(folder)
    compute = torch_compute() if plain else choose_compute(dtype, CPU, config.head_dim)
    model = Qwen3(config, ParallelState(), dtype, CPU, compute.operations)
    choose_formats(model, quantization, compute.kernels)
    load_weights(model, folder)
    runner = ModelRunner(model, KVPool(config, 1, 8, 16, dtype, CPU), compute, max_slots=2, context_length=64)
    compute.plan_layers(model, runner.backend)
    return runner


def logprobs(runner: ModelRunner) -> list[float]:
    """Of the prompt and one token behind it, whole."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0, seed=0, logprobs=True, prompt_logprobs=True)
    sampling = resolve(
        params, model_defaults={}, end_token_ids=(), prompt_tokens=len(PROMPT), context_length=64, vocab_size=256
    )
    new = NewSlot(0, 1, pack_ids(PROMPT), len(PROMPT), 0, pack_ids([0]), sampling)
    batch = ForwardBatch(0, new=[new], row_slots=pack_ids([0]), row_tokens=pack_ids([len(PROMPT)]))
    (row,) = runner.run(batch).logprobs
    runner.run(ForwardBatch(1, released=pack_ids([0]), row_slots=b"", row_tokens=b""))
    return [entry.logprob for entry in (*row.prompt, *row.sampled)]


@pytest.mark.parametrize("shape", [DENSE, DENSE | {"tie_word_embeddings": True}, MOE], ids=["dense", "tied", "moe"])
@pytest.mark.parametrize(
    ("dtype", "quantization", "plain"),
    [
        (torch.float32, "none", False),
        (torch.bfloat16, "none", False),
        (torch.bfloat16, "int8", False),
        (torch.bfloat16, "int4", False),
        (torch.float32, "none", True),  # oneDNN's packed matrices
        (torch.float16, "none", True),
    ],
    ids=["fp32", "bf16", "int8", "int4", "torch fp32", "torch fp16"],
)
def test_a_load_over_other_weights_is_a_fresh_start(
    tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype, quantization: str, plain: bool
) -> None:
    if not plain and load() is None:
        pytest.skip("no compiler here")
    make_checkpoint(tmp_path / "old", shape, seed=0)
    make_checkpoint(tmp_path / "new", shape, seed=1)
    runner = make_runner(tmp_path / "old", dtype, quantization, plain=plain)
    before, fresh = logprobs(runner), logprobs(make_runner(tmp_path / "new", dtype, quantization, plain=plain))
    programs = runner.model.all_layers
    load_weights(runner.model, tmp_path / "new")
    assert runner.model.all_layers is programs
    assert logprobs(runner) == fresh != before
    load_weights(runner.model, tmp_path / "old")
    assert logprobs(runner) == before


def test_plain_tensors_keep_their_addresses(tmp_path: Path) -> None:
    """Captured graphs hold them."""
    make_checkpoint(tmp_path / "old", DENSE, seed=0)
    make_checkpoint(tmp_path / "new", DENSE, seed=1)
    model = make_runner(tmp_path / "old", torch.float16, "none", plain=True).model
    matrices = [layer.attention.qkv.weight.tensor for layer in model.layers] + [model.head.weight.tensor]
    kept = [*matrices, model.embedding.weight.tensor, model.norm.weight.tensor]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in kept]
    load_weights(model, tmp_path / "new")
    now = [layer.attention.qkv.weight.tensor for layer in model.layers] + [model.head.weight.tensor]
    now += [model.embedding.weight.tensor, model.norm.weight.tensor]
    assert [tensor.data_ptr() for tensor in now] == [address for address, _ in before]
    assert not any(torch.equal(tensor, old) for tensor, (_, old) in zip(now, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_when_asked(tmp_path: Path, value: float) -> None:
    reference = make_checkpoint(tmp_path, DENSE, seed=0)
    model = make_runner(tmp_path, torch.float32, "none", plain=True).model
    with torch.no_grad():
        reference.model.layers[1].mlp.down_proj.weight[3, 5] = value
    reference.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has NaN or inf"):
        load_weights(model, tmp_path, finite=True)
    load_weights(model, tmp_path)  # a start takes what there is


def test_kernels_are_what_is_tested() -> None:
    kernels = load()
    assert kernels is None or choose_compute(torch.float32, CPU, 32).name == kernel_compute(kernels).name
