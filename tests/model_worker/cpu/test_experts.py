"""All experts of a layer in one call give what one product after another gives, and what transformers gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.qwen3.harness import (
    MOE,
    PagedRun,
    Row,
    device_batch,
    load_model,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from vibe_sgl_lite.model_worker.attention.cpu_backend import KernelAttention
from vibe_sgl_lite.model_worker.compute import Compute, kernel_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.experts import experts_of
from vibe_sgl_lite.model_worker.cpu.program import Program, plan_programs
from vibe_sgl_lite.model_worker.cpu.targets import runnable_targets
from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, MoEBlock
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER
from vibe_sgl_lite.qwen3.layers.weight import Piece
from vibe_sgl_lite.qwen3.model import Qwen3

BEST, *OTHERS = [target.name for target in runnable_targets()]
SHAPE = MOE | {"moe_intermediate_size": 64}
FORMATS = [
    (torch.bfloat16, "none"), (torch.bfloat16, "int8"), (torch.bfloat16, "int4"),
    (torch.float32, "none"), (torch.float32, "int8"), (torch.float32, "int4"),
]  # fmt: skip


def compute_on(threads: int, target: str | None = None) -> Compute:
    kernels = load(threads=threads, target=target)
    assert kernels is not None, "these tests need a C++ compiler"
    return kernel_compute(kernels)


def experts_alone(model: Qwen3, compute: Compute, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's experts on one rank's part: as a program, and step by step. x: [T, H], before the norm."""
    run, layer = PagedRun(model, compute=compute), model.layers[0]
    assert isinstance(run.backend, KernelAttention)
    block, tokens = layer.feed_forward, len(x)
    assert isinstance(block, MoEBlock)
    assert isinstance(block.dispatch, AllReduceDispatch)
    zeros = [0] * tokens
    starts, lengths = (np.array(values, dtype=np.int32) for values in ([0, tokens], [tokens]))
    batch = device_batch(starts, lengths, torch.zeros((1, 1), dtype=torch.int32), zeros, zeros, zeros)
    context = ForwardContext(model.rotary(batch.positions), run.backend, batch, NO_TIMER)
    program, got = Program(layer.blocks[1:], run.backend, model), x.clone()
    with torch.inference_mode():
        program.run(got, torch.zeros_like(x), context)
        normed = layer.blocks[1][0](x.clone(), torch.zeros_like(x), context)
        return got, block.dispatch.partial(normed, block.router, block.experts, NO_TIMER)


def some_rows(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("target", [BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_as_one_product_after_another(tmp_path: Path, dtype: torch.dtype, quantization: str, target: str) -> None:
    """On one rank, and on two and four that have a part of the experts each; any number of tokens."""
    make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(2, target)
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            place = Group(rank, ranks, object()) if ranks > 1 else Group()  # type: ignore[arg-type]
            parallel = ParallelState(rank=rank, tp=place, ep=place)
            model = load_model(tmp_path, parallel=parallel, dtype=dtype, compute=compute, quantization=quantization)
            for tokens in (1, 2, 7, 60):
                got, wanted = experts_alone(model, compute, some_rows(tokens, dtype))
                close = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: the weighted sum is rounded once
                assert (got.float() - wanted.float()).abs().max() <= close * wanted.float().abs().max(), (ranks, tokens)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(("experts", "width", "tokens"), [(4, 64, 3000), (64, 192, 33), (8, 64, 640)])
@pytest.mark.parametrize("target", [BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_parts_of_any_size(
    tmp_path: Path, target: str, experts: int, width: int, tokens: int, quantization: str, threads: int
) -> None:
    """More rows of an expert than are multiplied at once, more experts than threads, few rows beside many."""
    make_checkpoint(tmp_path, SHAPE | {"num_experts": experts, "moe_intermediate_size": width})
    compute = compute_on(threads, target)
    model = load_model(tmp_path, dtype=torch.bfloat16, compute=compute, quantization=quantization)
    got, wanted = (rows.float() for rows in experts_alone(model, compute, some_rows(tokens, torch.bfloat16)))
    far = (got - wanted).abs().amax(1) > 2e-2 * wanted.abs().max()
    assert far.sum() < 0.05 * tokens  # of experts that are as likely as each other, torch may take others


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_of_the_chosen(tmp_path: Path, normalize: bool) -> None:
    """Experts are those that torch chooses, and so are their weights, also where these do not add up to 1. A row that
    is not finite gives one that is not, and harms no other."""
    make_checkpoint(tmp_path, SHAPE | {"norm_topk_prob": normalize, "num_experts_per_tok": 3})
    compute = compute_on(2)
    model = load_model(tmp_path, compute=compute, quantization="none")
    x = some_rows(20, torch.float32)
    x[3], x[7, 5] = float("nan"), float("inf")
    got, wanted = experts_alone(model, compute, x)
    finite = [row for row in range(20) if row not in (3, 7)]
    assert torch.allclose(got[finite], wanted[finite], atol=1e-5, rtol=1e-5)
    assert not torch.isfinite(got[[3, 7]]).any()


def test_alike_scores(tmp_path: Path) -> None:
    """Of experts that are as likely as each other, the first ones are taken, each once."""
    make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(1)
    model = load_model(tmp_path, compute=compute, quantization="none")
    block = model.layers[0].feed_forward
    assert isinstance(block, MoEBlock)
    block.router.weight.install(torch.zeros(block.router.weight.shape), Piece(slice(0, SHAPE["num_experts"])))
    x = some_rows(5, torch.float32)
    got, _ = experts_alone(model, compute, x)
    normed = compute.operations.add_rms_norm(
        x.clone(), torch.zeros_like(x), model.layers[0].feed_forward_norm.weight.tensor, model.norm.eps
    )
    counts = torch.tensor([len(x)] * SHAPE["num_experts_per_tok"] + [0] * 6)
    parts = block.experts(normed.repeat(2, 1), counts, NO_TIMER).view(2, *x.shape)
    assert torch.allclose(got, parts.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_as_transformers(tmp_path: Path, threads: int) -> None:
    reference = make_checkpoint(tmp_path, SHAPE)
    compute, tokens = compute_on(threads), random_tokens(70)
    model = load_model(tmp_path, compute=compute, quantization="none")
    run = PagedRun(model, num_pages=64, page_size=16, compute=compute)
    plan_programs(model, run.backend)
    row = Row(tokens)
    with torch.inference_mode():
        logits = torch.cat([run.step([(row, count)]) for count in (50, 1, 19)])
    assert torch.allclose(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


def test_what_is_left_to_torch(tmp_path: Path) -> None:
    """Widths of no whole slabs, inputs that are filled up, rows that go to other ranks."""
    shapes: dict[str, Any] = {"odd": {"moe_intermediate_size": 48}, "filled up": {"hidden_size": 72}, "sent": {}}
    for name, shape in shapes.items():
        make_checkpoint(tmp_path / name, SHAPE | shape)
        model = load_model(
            tmp_path / name,
            compute=compute_on(1),
            quantization="none",
            dispatch="all_to_all" if name == "sent" else "all_reduce",
        )
        for layer in model.layers:
            assert isinstance(layer.feed_forward, MoEBlock)
            assert experts_of(layer.feed_forward) is None
