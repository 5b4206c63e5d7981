"""Layers as programs give the bits that one step after another gives, and are used wherever they can be."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model_worker.test_model_runner import Driver, new_slot, runner_of
from tests.qwen3.harness import (
    DENSE,
    MOE,
    PagedRun,
    Row,
    load_model,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from vibe_sgl_lite.model_worker.compute import Compute, kernel_compute, torch_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.build import build
from vibe_sgl_lite.model_worker.cpu.library import open_library, structures
from vibe_sgl_lite.model_worker.cpu.program import Program, ProgramLayers, plan_programs
from vibe_sgl_lite.model_worker.cpu.targets import choose_target
from vibe_sgl_lite.model_worker.step_timer import StepTimer
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER
from vibe_sgl_lite.qwen3.model import Qwen3

SHAPE = DENSE | {"intermediate_size": 192}


def compute_on(threads: int) -> Compute:
    kernels = load(threads=threads)
    assert kernels is not None, "these tests need a C++ compiler"
    return kernel_compute(kernels)


def steps(model: Qwen3, compute: Compute, *, fused: bool, int8: bool = False) -> list[Tensor]:
    """Logits of a chunk of many rows, of one beside decoding rows, and of decoding rows alone."""
    run = PagedRun(model, num_pages=64, page_size=16, compute=compute, int8=int8)
    if fused:
        plan_programs(model, run.backend)
        assert isinstance(model.all_layers, ProgramLayers)
    long, short, third = (Row(random_tokens(n, seed=n)) for n in (150, 20, 80))
    with torch.inference_mode():
        return [
            run.step([(long, 130), (short, 17)]),
            run.step([(long, 1), (third, 40), (short, 1)]),
            run.step([(long, 1), (third, 1), (short, 1)]),
            run.step([(third, 1)]),
        ]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8-kv"])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        (torch.bfloat16, "none"),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int4"),
        (torch.float32, "int8"),
        (torch.float32, "int4"),
    ],
)
def test_the_same_bits(tmp_path: Path, dtype: torch.dtype, quantization: str, int8: bool, threads: int) -> None:
    make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(threads)
    apart, fused = (
        steps(
            load_model(tmp_path, dtype=dtype, compute=compute, quantization=quantization), compute, int8=int8, fused=f
        )
        for f in (False, True)
    )
    for number, (one, other) in enumerate(zip(apart, fused, strict=True)):
        assert bool(torch.isfinite(one).all())
        rows = (one != other).any(1).nonzero().flatten().tolist()
        assert not rows, f"step {number}, rows {rows}: {one[rows]} and {other[rows]}"


def test_close_to_transformers(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(2)
    model = load_model(tmp_path, dtype=torch.bfloat16, compute=compute, quantization="none")
    logits = steps(model, compute, int8=False, fused=True)
    wanted = reference_logits(reference, random_tokens(150, seed=150))
    scale = wanted.abs().max()
    assert (logits[0][:130].float() - wanted[:130]).abs().max() < 0.05 * scale
    assert (logits[1][0].float() - wanted[130]).abs().max() < 0.05 * scale


def test_parts_are_timed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SHAPE)
    compute = compute_on(2)
    tokens = []
    for timed in (False, True):
        timer = StepTimer()
        model = load_model(tmp_path, dtype=torch.bfloat16, compute=compute, quantization="none")
        runner = runner_of(model, compute=compute, timer=timer if timed else NO_TIMER)
        plan_programs(runner.model, runner.backend)
        driver = Driver(runner)
        driver.run([(0, 13)], new=[new_slot(0, random_tokens(13))])
        timer.take()
        result = driver.run([(0, 1)])
        taken = timer.take()
        if timed:
            assert {"norm", "qkv", "rope", "attention", "o", "gate_up", "down", "head"} < {*taken}
            assert result.total_s <= sum(taken.values())
            assert sum(taken.values()) - taken[OTHER] <= result.total_s
        tokens.append(driver.tokens)
    assert tokens[0] == tokens[1]


def pieces_of(folder: Path, shape: dict[str, Any], **options: Any) -> list[type]:
    make_checkpoint(folder, shape)
    compute = compute_on(1)
    model = load_model(folder, dtype=torch.bfloat16, compute=compute, **options)
    plan_programs(model, PagedRun(model, compute=compute).backend)
    return [type(piece) for piece in model.all_layers.pieces] if isinstance(model.all_layers, ProgramLayers) else []


def test_a_program_is_as_long_as_it_can_be(tmp_path: Path) -> None:
    """Experts, these and a feed-forward of no whole slabs, matrices in torch's formats, plain torch, several ranks."""
    assert pieces_of(tmp_path / "whole", SHAPE, quantization="none") == [Program]
    assert pieces_of(tmp_path / "moe", MOE | {"moe_intermediate_size": 64}, quantization="none") == [Program]
    assert pieces_of(tmp_path / "thin", MOE, quantization="none") == [Program, tuple] * 2
    assert pieces_of(tmp_path / "odd", DENSE, quantization="none") == [Program, tuple] * 2
    assert pieces_of(tmp_path / "plain", SHAPE) == []
    model = load_model(tmp_path / "plain", dtype=torch.bfloat16, compute=compute_on(1), quantization="none")
    plan_programs(model, PagedRun(model, compute=torch_compute()).backend)
    assert model.all_layers is None
    for layer in model.layers:
        for linear in (layer.attention.output, layer.feed_forward.down):  # type: ignore[union-attr]
            linear.group = Group(0, 2, object())  # type: ignore[arg-type]
    plan_programs(model, PagedRun(model, compute=compute_on(1)).backend)
    assert isinstance(model.all_layers, ProgramLayers)
    assert [type(piece) for piece in model.all_layers.pieces] == [Program, Group] * 4


@pytest.mark.parametrize("shape", [MOE, DENSE], ids=["moe", "odd"])
def test_the_same_bits_between_steps(tmp_path: Path, shape: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, shape)
    compute = compute_on(2)
    apart, planned = (
        steps(load_model(tmp_path, dtype=torch.bfloat16, compute=compute, quantization="none"), compute, fused=f)
        for f in (False, True)
    )
    for one, other in zip(apart, planned, strict=True):
        assert torch.equal(one, other)


def test_other_structures_are_refused(tmp_path: Path) -> None:
    """A library compiled with another abi.h is not called."""
    path = build(flags=("-O1",), target=choose_target("baseline"))
    content, size = path.read_bytes(), ctypes.sizeof(structures()["RunProgramCall"])
    numbers = b"".join(n.to_bytes(8, "little") for n in (size, 0, 8, 16))
    assert content.count(numbers) == 1
    changed = tmp_path / "changed.so"
    changed.write_bytes(content.replace(numbers, (size + 8).to_bytes(8, "little") + numbers[8:]))
    with pytest.raises(OSError, match=r"was compiled with other structures than .*abi\.h"):
        open_library(changed)
