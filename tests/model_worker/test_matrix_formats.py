"""Which format a rank's matrices get, and what they then take."""

from pathlib import Path

import pytest
import torch

from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.slab_matrix import QuantizedSlabMatrix, SlabMatrix
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.weights import load_dummy_weights
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.weight import PackedMatrix
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
TIED = DENSE | {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    loaded = load(threads=2)
    assert loaded is not None, "these tests need a C++ compiler"
    return loaded


def model_of(
    folder: Path, kernels: CpuKernels | None, quantization: str, dtype: torch.dtype, shape: dict[str, object]
) -> Qwen3:
    make_checkpoint(folder, shape)
    model = Qwen3(ModelConfig.from_folder(folder), ParallelState(), dtype, CPU, TorchOperations())
    choose_formats(model, quantization, kernels)
    load_dummy_weights(model, 0)
    return model


def test_bf16_is_for_the_kernels_and_fp32_for_torch(tmp_path: Path, kernels: CpuKernels) -> None:
    bf16 = model_of(tmp_path / "bf16", kernels, "none", BF16, DENSE)
    assert isinstance(bf16.head.weight.matrix, SlabMatrix)
    assert isinstance(bf16.layers[0].attention.qkv.weight.matrix, SlabMatrix)
    fp32 = model_of(tmp_path / "fp32", kernels, "none", FP32, DENSE)
    assert isinstance(fp32.head.weight.matrix, PackedMatrix)
    quantised = model_of(tmp_path / "int4", kernels, "int4", FP32, DENSE)
    assert isinstance(quantised.head.weight.matrix, QuantizedSlabMatrix)


def test_a_matrix_with_odd_inputs_is_left_to_torch(tmp_path: Path, kernels: CpuKernels) -> None:
    model = model_of(tmp_path, kernels, "none", BF16, DENSE | {"intermediate_size": 80})
    assert isinstance(model.head.weight.matrix, SlabMatrix)
    down = model.layers[0].feed_forward.down.weight.matrix  # type: ignore[union-attr]
    assert not isinstance(down, SlabMatrix)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("fast", [True, False])
def test_fewer_bits_take_less_memory(tmp_path: Path, kernels: CpuKernels, shape: dict[str, object], fast: bool) -> None:
    sizes = []
    for quantization in ("none", "int8", "int4"):
        model = model_of(tmp_path / quantization, kernels if fast else None, quantization, BF16, shape)
        sizes.append(weight_bytes(model) - model.embedding.weight.nbytes)
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_tied_embedding_takes_its_rows_from_the_head(tmp_path: Path, kernels: CpuKernels) -> None:
    once = model_of(tmp_path / "once", kernels, "none", BF16, TIED)
    twice = model_of(tmp_path / "twice", None, "int8", BF16, TIED)
    assert once.embedding.weight.nbytes == 0
    assert twice.embedding.weight.nbytes == twice.embedding.weight.tensor.nbytes
    ids = torch.arange(once.config.vocab_size)
    rows = once.embedding(ids)
    assert rows.dtype == BF16
    assert torch.equal(rows, twice.embedding(ids))
    assert torch.equal(once.embedding(ids.flip(0).to(torch.int32)), rows.flip(0))
