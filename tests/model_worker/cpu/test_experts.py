"""All experts of a layer in one call give what one product after another gives, and what transformers gives."""

from pathlib import Path

import pytest
import torch

from tests.qwen3.harness import MOE, PagedRun, Row, load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite.model_worker.compute import Compute, kernel_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.experts import KernelDispatch, plan_experts
from vibe_sgl_lite.model_worker.cpu.program import plan_programs
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, MoEBlock
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER

SHAPE = MOE | {"moe_intermediate_size": 64}
FORMATS = [
    (torch.bfloat16, "none"), (torch.bfloat16, "int8"), (torch.bfloat16, "int4"),
    (torch.float32, "none"), (torch.float32, "int8"), (torch.float32, "int4"),
]  # fmt: skip


def compute_on(threads: int, target: str | None = None) -> Compute:
    kernels = load(threads=threads, target=target)
    assert kernels is not None, "these tests need a C++ compiler"
    return kernel_compute(kernels)


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_as_one_product_after_another(tmp_path: Path, dtype: torch.dtype, quantization: str) -> None:
    """On one rank, and on two and four that have a part of the experts each; any number of tokens."""
    make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(2)
    assert compute.kernels is not None
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            place = Group(rank, ranks, object()) if ranks > 1 else Group()  # type: ignore[arg-type]
            parallel = ParallelState(rank=rank, tp=place, ep=place)
            model = load_model(tmp_path, parallel=parallel, dtype=dtype, compute=compute, quantization=quantization)
            block = model.layers[0].feed_forward
            assert isinstance(block, MoEBlock)
            plain = block.dispatch
            plan_experts(model, compute.kernels)
            assert isinstance(plain, AllReduceDispatch)
            assert isinstance(block.dispatch, KernelDispatch)
            for tokens in (1, 2, 7, 60):
                x = torch.randn(tokens, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(tokens)).to(dtype)
                with torch.inference_mode():
                    wanted = plain.partial(x, block.router, block.experts, NO_TIMER)
                    got = block.dispatch.partial(x, block.router, block.experts, NO_TIMER)
                close = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: the weighted sum is rounded once
                assert (got.float() - wanted.float()).abs().max() <= close * wanted.float().abs().max(), (ranks, tokens)


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
    for name, shape in (("odd", {"moe_intermediate_size": 48}), ("filled up", {"hidden_size": 72})):
        make_checkpoint(tmp_path / name, SHAPE | shape)
        compute = compute_on(1)
        assert compute.kernels is not None
        model = load_model(tmp_path / name, compute=compute, quantization="none")
        plan_experts(model, compute.kernels)
        for layer in model.layers:
            assert isinstance(layer.feed_forward, MoEBlock)
            assert type(layer.feed_forward.dispatch) is AllReduceDispatch
