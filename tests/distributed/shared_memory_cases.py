"""What the ranks of test_shared_memory.py run."""

import contextlib
import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.qwen3.harness import PagedRun, Row, load_model, random_tokens
from vibe_sgl_lite.model_worker.compute import kernel_compute
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load, shared_memory
from vibe_sgl_lite.model_worker.cpu.program import ProgramLayers, plan_programs
from vibe_sgl_lite.model_worker.cpu.shared_memory import SharedMemory, share_memory
from vibe_sgl_lite.model_worker.parallel import build_state

SHAPES = [(), (1,), (3, 7), (64, 129), (2, 20_001)]
CAPACITY = 1 << 16
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.float64]


def kernels_of(threads: int = 1) -> CpuKernels:
    kernels = load(threads=threads)
    assert kernels is not None, "these tests need a C++ compiler"
    return kernels


def all_cases(rank: int, world_size: int, root: Path) -> list[str]:
    """What was wrong, in words."""
    return as_gloo(rank, world_size) + model(rank, world_size, root) + one_cannot(rank, world_size)


def as_gloo(rank: int, world_size: int) -> list[str]:
    """Collectives of many sizes and dtypes, more than fits at once too, ranks late by turns."""
    plain = build_state(rank, world_size, 1).tp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "CAPACITY", CAPACITY)
        group = share_memory(build_state(rank, world_size, 1), kernels_of(4 // world_size)).tp
    assert isinstance(group.peers, SharedMemory)
    draw = torch.Generator().manual_seed(rank)
    turns = random.Random(7)  # the same on all ranks
    wrong, taken = [], 0
    for turn in range(120):
        shape, dtype = turns.choice(SHAPES), turns.choice(DTYPES)
        kind = turns.choice(["all_reduce", "all_reduce_max", "all_reduce_min", "all_gather"])
        late, delay_s = turns.randrange(2 * world_size), turns.choice([0.0, 0.001, 0.01])
        x = (torch.randn(shape, generator=draw) * 100).to(dtype)
        if not shape and kind == "all_gather":
            x = x[None]
        # Gloo adds bf16 in bf16, from rank to rank; here it is rounded once.
        exact = dtype == torch.bfloat16 and kind == "all_reduce"
        wanted = getattr(plain, kind)(x.to(torch.float32) if exact else x.clone()).to(dtype)
        if late == rank:
            time.sleep(delay_s)
        here = x.nbytes <= CAPACITY or (kind == "all_reduce" and dtype in (torch.float32, torch.bfloat16))
        taken += here
        got = getattr(group, kind)(x)
        close = torch.allclose(got, wanted, rtol=1e-6 if world_size > 2 else 0, atol=1e-3 if world_size > 2 else 0)
        if not close and not (exact and torch.allclose(got, wanted, rtol=0.01)):
            wrong.append(f"{turn}: {kind} of {shape}, {dtype}: {got.flatten()[:4]} and not {wanted.flatten()[:4]}")
        bits = group.all_gather(got.flatten()[None].view(torch.uint8))
        if not all(torch.equal(bits[0], other) for other in bits):
            wrong.append(f"{turn}: {kind} of {shape}, {dtype}: the ranks have other bits")
    if taken < 50:
        wrong.append(f"shared memory took only {taken}")
    return wrong[:5]


def model(rank: int, world_size: int, root: Path) -> list[str]:
    """bf16 through programs of the kernels: one program, close to one rank's logits."""
    kernels, wrong = kernels_of(), []
    parallel = share_memory(build_state(rank, world_size, 1), kernels)
    compute = kernel_compute(kernels)
    found = []
    for state in (None, parallel):
        loaded = load_model(root, dtype=torch.bfloat16, compute=compute, quantization="none", parallel=state)
        run = PagedRun(loaded, num_pages=64, page_size=16, compute=compute)
        plan_programs(loaded, run.backend)
        if not isinstance(loaded.all_layers, ProgramLayers) or len(loaded.all_layers.pieces) != 1:
            wrong.append("the layers are not one program")
        rows = [Row(random_tokens(90, seed=1)), Row(random_tokens(9, seed=2))]
        with torch.inference_mode():
            logits = [run.step([(rows[0], 60), (rows[1], 5)])] + [
                run.step([(row, 1) for row in rows]) for _ in range(4)
            ]
        found.append(torch.cat(logits).float())
    alone, part = found
    vocab = part.shape[1]
    alone = alone[:, rank * vocab : (rank + 1) * vocab]
    if not (alone - part).abs().max() < 0.03 * alone.abs().max():
        wrong.append(f"logits differ by {(alone - part).abs().max()} of {alone.abs().max()}")
    return wrong


def one_cannot(rank: int, world_size: int) -> list[str]:
    """One rank without the memory: all use Gloo, and nothing is left open."""
    wrong = []
    before = open_memory()
    for who, what in ((0, "memfd_create"), (1, "open")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr(f"os.{what}", refuse)
            group = share_memory(build_state(rank, world_size, 1), kernels_of()).tp
        if group.peers is not None:
            wrong.append(f"{what} failed, and memory is shared")
        if group.all_reduce(torch.ones(3)).tolist() != [world_size] * 3:
            wrong.append("a sum that is wrong")
    left = open_memory()[len(before) :]
    return wrong + ([f"{left} left open"] if left else [])


def open_memory() -> list[str]:
    """Open memory files of this process; sockets of groups that ended are closed by threads, sooner or later."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(link for link in links if "memfd:" in link)


def refuse(*_: object) -> int:
    raise PermissionError("not here")
