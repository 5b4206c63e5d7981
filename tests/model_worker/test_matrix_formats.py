"""Which format a rank's matrices get, and what they then take."""

from pathlib import Path

import pytest
import torch

from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.weights import load_dummy_weights
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes
from vibe_sgl_lite.qwen3.layers.matrix import Matrix
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
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


def format_of(matrix: Matrix) -> WeightFormat:
    assert isinstance(matrix, SlabMatrix)
    return matrix.weights.format


def test_the_kernels_multiply_all_formats(tmp_path: Path, kernels: CpuKernels) -> None:
    for quantization, dtype, kept in (
        ("none", BF16, WeightFormat.BF16),
        ("none", FP32, WeightFormat.FP32),
        ("int8", BF16, WeightFormat.INT8),
        ("int4", FP32, WeightFormat.INT4),
    ):
        # A feed-forward of 80 is no multiple of 32 inputs.
        shape = DENSE | {"intermediate_size": 80}
        model = model_of(tmp_path / f"{quantization}-{dtype}", kernels, quantization, dtype, shape)
        assert format_of(model.head.weight.matrix) is kept
        assert format_of(model.layers[0].attention.qkv.weight.matrix) is kept
        assert format_of(model.layers[0].feed_forward.down.weight.matrix) is kept  # type: ignore[union-attr]
    assert not isinstance(model_of(tmp_path / "torch", None, "none", BF16, DENSE).head.weight.matrix, SlabMatrix)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_fewer_bits_take_less_memory(tmp_path: Path, kernels: CpuKernels, shape: dict[str, object]) -> None:
    sizes = []
    for quantization in ("none", "int8", "int4"):
        model = model_of(tmp_path / quantization, kernels, quantization, BF16, shape)
        sizes.append(weight_bytes(model) - model.embedding.weight.nbytes)
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_tied_embedding_takes_its_rows_from_the_head(tmp_path: Path, kernels: CpuKernels) -> None:
    once = model_of(tmp_path / "once", kernels, "none", BF16, TIED)
    twice = model_of(tmp_path / "twice", kernels, "int8", BF16, TIED)
    assert once.embedding.weight.nbytes == 0
    assert twice.embedding.weight.nbytes == twice.embedding.weight.tensor.nbytes
    ids = torch.arange(once.config.vocab_size)
    rows = once.embedding(ids)
    assert rows.dtype == BF16
    assert torch.equal(rows, twice.embedding(ids))
    assert torch.equal(once.embedding(ids.flip(0).to(torch.int32)), rows.flip(0))
