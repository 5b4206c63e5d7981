"""Quantised matrices in a model: which there are, on ranks, among experts; and what they cost one that is of use."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.tiny_model.prompts import ClosedPrompt, answer_of, closed_answer_prompts
from examples.tiny_model.template import Message, render_chat
from tests.qwen3.harness import DENSE, MOE, PagedRun, Row, make_checkpoint
from vibe_sgl_lite.model_worker.compute import choose_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat, SlabMatrix
from vibe_sgl_lite.model_worker.gpu.fp8_matrix import Fp8Matrix
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[3] / "vibe_sgl_lite" / "models" / "tiny"
KINDS = pytest.mark.parametrize("kind", [WeightFormat.INT8, WeightFormat.INT4])


def make(kind: WeightFormat) -> SlabFormat:
    kernels = load()
    assert kernels is not None, "these tests need a C++ compiler"
    return SlabFormat(kernels, kind)


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes with a few large values, as activations and weights have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[:, :: shape[1] // 4] *= 8
    return values * torch.logspace(-2, 2, shape[0]).unsqueeze(1)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest error of any row, in units of that row's norm."""
    return float(((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@KINDS
def test_rows_and_groups_of_one_value(kind: WeightFormat) -> None:
    weights = torch.zeros(64, 64)
    weights[1] = 3.0
    weights[2] = -0.5
    x = torch.stack((torch.zeros(64), torch.ones(64)))
    assert torch.allclose(make(kind)(weights).multiply(x), x @ weights.T, rtol=1e-5)


@KINDS
def test_experts_are_quantised_one_by_one(kind: WeightFormat) -> None:
    weight = ExpertWeight(3, 48, 64, torch.float32, CPU)
    weight.keep_as(make(kind))
    matrices = outliers(3 * 48, 64).view(3, 48, 64)
    weight.install(matrices)
    x = outliers(6, 64, seed=1)
    product = weight.multiply_grouped(x, torch.tensor([2, 0, 4]))
    expected = torch.cat((make(kind)(matrices[0]).multiply(x[:2]), make(kind)(matrices[2]).multiply(x[2:])))
    assert torch.equal(product, expected)


def model_of(folder: Path, kind: str, dtype: torch.dtype, parallel: ParallelState | None = None) -> Qwen3:
    config = ModelConfig.from_folder(folder)
    compute = choose_compute(dtype, CPU, config.head_dim)
    model = Qwen3(config, parallel or ParallelState(), dtype, CPU, compute.operations)
    choose_formats(model, kind, compute.kernels)
    load_weights(model, folder)
    return model


@pytest.mark.parametrize(("kind", "kept"), [("int8", WeightFormat.INT8), ("int4", WeightFormat.INT4)])
def test_routers_and_embeddings_keep_their_format(tmp_path: Path, kind: str, kept: WeightFormat) -> None:
    def is_kept(matrix: object) -> bool:
        return isinstance(matrix, SlabMatrix) and matrix.weights.format is kept

    make_checkpoint(tmp_path, MOE)
    model = model_of(tmp_path, kind, torch.float32)
    block = model.layers[0].feed_forward
    assert isinstance(block, MoEBlock)
    assert isinstance(block.router.weight.matrix, SlabMatrix)
    assert block.router.weight.matrix.weights.format is WeightFormat.FP32
    assert is_kept(model.head.weight.matrix)
    assert is_kept(model.layers[1].attention.qkv.weight.matrix)
    assert all(is_kept(matrix) for matrix in block.experts.down._matrices)
    if kind == "int8":
        assert model.embedding.weight.tensor.dtype == torch.float32
        return
    exact = model_of(tmp_path, "int8", torch.float32).embedding.weight
    ids = torch.tensor([5, 0, 255, 5])
    rows, wanted = model.embedding.weight.rows(ids), exact.rows(ids)
    assert rows.dtype == torch.float32
    assert ((rows - wanted).abs() <= 0.501 * wanted.abs().amax(1, keepdim=True) / 127).all()  # half a step of each row
    assert model.embedding.weight.nbytes < 0.3 * exact.nbytes


def half(rank: int) -> ParallelState:
    """One of two ranks that never communicate."""
    group: Any = object()
    part = Group(rank, 2, group)
    return ParallelState(rank=rank, tp=part, expert_tp=part)


def down(model: Qwen3) -> MatrixWeight:
    """The row-parallel matrix of the first layer's MLP."""
    block = model.layers[0].feed_forward
    assert isinstance(block, MLP)
    return block.down.weight


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_ranks_quantise_their_own_slices(tmp_path: Path, kind: str) -> None:
    """A column-parallel matrix is the same in parts; of a row-parallel one each part has scales of its own."""
    make_checkpoint(tmp_path, DENSE | {"intermediate_size": 128})
    whole = model_of(tmp_path, kind, torch.float32)
    ranks = [model_of(tmp_path, kind, torch.float32, half(rank)) for rank in range(2)]
    x = outliers(5, 64, seed=1)
    parts = [model.head.weight.multiply(x) for model in ranks]
    assert torch.allclose(torch.cat(parts, dim=1), whole.head.weight.multiply(x), rtol=1e-5, atol=1e-5)
    wide = outliers(5, 128, seed=2)
    halves = torch.split(wide, 64, dim=1)
    added = sum(down(model).multiply(x.contiguous()) for model, x in zip(ranks, halves, strict=True))
    assert isinstance(added, Tensor)
    exact = down(model_of(tmp_path, "none", torch.float32)).multiply(wide).double()
    limit = 0.03 if kind == "int8" else 0.2
    assert relative(down(whole).multiply(wide), exact) < limit
    assert relative(added, exact) < limit


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--quantization int8 runs on CPU only") as refused:
        ServerArgs(quantization="int8", device="cuda")
    assert refused.value.field == "quantization"
    with pytest.raises(ConfigError, match="must be one of none, int8, int4, fp8"):
        ServerArgs(quantization="int2")
    with pytest.raises(ConfigError, match="quantization fp8 runs on a GPU only"):
        ServerArgs(quantization="fp8", device="cpu")
    make_checkpoint(tmp_path, DENSE)
    config = ModelConfig.from_folder(tmp_path)
    model = Qwen3(config, half(0), torch.float32, CPU, TorchOperations())
    with pytest.raises(ConfigError, match="--quantization int4 needs the CPU kernels, which could not be built"):
        choose_formats(model, "int4", None)
    meta = Qwen3(config, ParallelState(), torch.float32, torch.device("meta"), TorchOperations())
    with pytest.raises(ConfigError, match="--quantization int8 runs on CPU only, not on meta: use int4 or fp8"):
        choose_formats(meta, "int8", None)
    with pytest.raises(ConfigError, match="--quantization fp8 runs on a GPU only, not on cpu: use int8 or int4"):
        choose_formats(model, "fp8", None)


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        (DENSE, torch.float32, "fp8 is for bfloat16, not for float32"),
        (MOE, torch.bfloat16, "fp8 is for dense models"),
        (DENSE | {"intermediate_size": 72}, torch.bfloat16, "multiples of 16"),
        (DENSE, torch.bfloat16, None),
    ],
)
def test_what_a_gpu_keeps_in_fp8(
    tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, shape)
    model = Qwen3(ModelConfig.from_folder(tmp_path), ParallelState(), dtype, CPU, TorchOperations())
    monkeypatch.setattr(model, "device", torch.device("cuda"))  # of which only the name is asked
    if why is not None:
        with pytest.raises(ConfigError, match=why):
            choose_formats(model, "fp8", None)
        return
    choose_formats(model, "fp8", None)
    monkeypatch.undo()
    load_dummy_weights(model, 0)
    assert isinstance(model.head.weight.matrix, Fp8Matrix)
    qkv = model.layers[0].attention.qkv.weight
    assert qkv.nbytes == qkv.shape[0] * (qkv.shape[1] + 4)


class Tiny:
    """The embedded model as `kind`, answering and judging whole conversations."""

    def __init__(self, kind: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        self.run = partial(PagedRun, model_of(TINY, kind, torch.bfloat16), num_pages=64, page_size=16)
        self.compute = choose_compute(torch.bfloat16, CPU, 32)

    def logits(self, text: str) -> Tensor:
        row = Row(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return self.run(compute=self.compute).step([(row, len(row.tokens))]).float()

    def is_right(self, prompt: ClosedPrompt) -> bool:
        text = render_chat(prompt.messages, add_generation_prompt=True, enable_thinking=False)
        row = Row(self.tokenizer.encode(text, add_special_tokens=False).ids)
        expected = self.tokenizer.encode(prompt.expected + "<|im_end|>", add_special_tokens=False).ids
        ids = self.run(compute=self.compute).greedy(row, len(expected), 512)
        return answer_of(self.tokenizer.decode(ids)) == prompt.expected


@pytest.fixture(scope="module")
def plain() -> Tiny:
    return Tiny("none")


@pytest.mark.parametrize(
    ("kind", "divergence", "agreement"),
    [pytest.param("int8", 0.01, 0.94, marks=pytest.mark.slow), ("int4", 0.08, 0.85)],
)
def test_the_embedded_model_still_knows_its_tasks(plain: Tiny, kind: str, divergence: float, agreement: float) -> None:
    quantised = Tiny(kind)
    prompts = closed_answer_prompts(20, seed=7)
    right = sum(map(quantised.is_right, prompts))
    assert right >= sum(map(plain.is_right, prompts)) - 2

    answer: list[Message] = [
        {"role": "assistant", "content": "<think>\nOne by one.\n</think>\n\n" + prompts[0].expected}
    ]
    texts = [render_chat(prompt.messages + answer) for prompt in prompts[:10]]
    expected = torch.cat([plain.logits(text) for text in texts])
    actual = torch.cat([quantised.logits(text) for text in texts])
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < divergence
    assert (expected.argmax(-1) == actual.argmax(-1)).float().mean() > agreement
