"""The kernels of Arm CPUs, cross-compiled and run by qemu-user, through the tests of every other target.

They say that the results are right, and nothing about speed. An instruction that the emulated CPU lacks ends them.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.model_worker.cpu import emulator, test_attention, test_program
from tests.model_worker.cpu.test_experts import SHAPE as EXPERTS
from tests.model_worker.cpu.test_targets import (
    FLAGS,
    test_chunks_of_long_contexts,
    test_elementwise,
    test_head_dims,
    test_linear,
    test_rows_and_packing,
    test_the_largest_int8_sums_are_exact,
)
from tests.qwen3.harness import load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite.model_worker.compute import kernel_compute
from vibe_sgl_lite.model_worker.cpu import CpuKernels, huge_memory
from vibe_sgl_lite.model_worker.cpu.build import build
from vibe_sgl_lite.model_worker.cpu.targets import TARGETS

__all__ = [
    "test_chunks_of_long_contexts",
    "test_elementwise",
    "test_head_dims",
    "test_linear",
    "test_rows_and_packing",
    "test_the_largest_int8_sums_are_exact",
]

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
CPUS = {"neon_bf16": "max", "neon_dotprod": "neoverse-n1", "neon": "cortex-a53"}  # the plainest that has it all

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (Debian has both)"),
    pytest.mark.slow,  # compiles each target, and emulates it
]


@pytest.fixture(scope="module", params=CPUS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuKernels]:
    target = next(target for target in TARGETS["aarch64"] if target.name == request.param)
    program = tmp_path_factory.mktemp("neon") / "emulated"
    subprocess.run([COMPILER, "-O1", str(emulator.SOURCE), "-o", str(program)], check=True, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        path = build(compilers=[COMPILER], target=target, flags=FLAGS)
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", CPUS[target.name]]
        library = emulator.EmulatedLibrary(command, program, path)
        address = Tensor.data_ptr

        def known_address(tensor: Tensor) -> int:
            library.know(tensor)
            return address(tensor)

        patch.setattr(Tensor, "data_ptr", known_address)
        patch.setattr(huge_memory, "REGION_BYTES", 0)  # all of a region would go along with each call
        made = CpuKernels(cast(ctypes.CDLL, library), 1)
        assert made.instruction_set == target.name
        yield made
        library.close()


@test_attention.INT8
@pytest.mark.parametrize("seed", range(3))
def test_attention_of_many_kinds(kernels: CpuKernels, seed: int, int8: bool) -> None:
    test_attention.test_decode_and_chunk_rows_in_one_call(kernels, seed, int8)


@pytest.mark.parametrize(
    ("shape", "dtype", "quantization", "int8", "allowed"),
    [
        (test_program.SHAPE, torch.bfloat16, "none", False, 0.05),
        (test_program.SHAPE, torch.bfloat16, "int4", True, 0.5),
        (EXPERTS, torch.float32, "none", False, 1e-3),  # with roundings, other experts would be chosen
    ],
)
def test_layers(
    kernels: CpuKernels,
    tmp_path: Path,
    shape: dict[str, object],
    dtype: torch.dtype,
    quantization: str,
    int8: bool,
    allowed: float,
) -> None:
    """All in one call give the bits of one step after another, and what transformers gives."""
    reference = make_checkpoint(tmp_path, shape)
    compute = kernel_compute(kernels)
    apart, fused = (
        test_program.steps(
            load_model(tmp_path, dtype=dtype, compute=compute, quantization=quantization),
            compute,
            int8=int8,
            fused=fused,
        )
        for fused in (False, True)
    )
    if shape is not EXPERTS:  # whose outputs are added in fp32 there
        assert all(torch.equal(one, other) for one, other in zip(apart, fused, strict=True))
    wanted = reference_logits(reference, random_tokens(150, seed=150))
    allowed *= float(wanted.abs().max())
    assert (fused[0][:130].float() - wanted[:130]).abs().max() < allowed
    assert (fused[1][0].float() - wanted[130]).abs().max() < allowed
