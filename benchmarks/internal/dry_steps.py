"""Compiles what parallel_steps.py will launch, in several processes and without a card: its steps with one layer, on
the CPU, where no kernel runs and no product is made. A rank's kernels may be its own, so all ranks' are.

    python benchmarks/internal/dry_steps.py --shapes 32B,8B --jobs 30
    python benchmarks/internal/dry_steps.py --shapes 32B --rows 64 --compile 3      lists them, and compiles so many

--engine: also what the warm-up of an engine launches that has so few rows and tokens (parallel_gpu.py's recovery).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/dry_steps.py` finds the packages

from benchmarks.internal import parallel_steps, parallel_variants  # noqa: E402
from benchmarks.internal.gpu_timing import NoCard  # noqa: E402
from benchmarks.parallel_gpu import ENGINE  # noqa: E402
from vibe_sgl_lite.model_worker.compute import GpuSetup, gpu_compute  # noqa: E402
from vibe_sgl_lite.model_worker.gpu import attention_backend, collectives, draw, operations  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.collectives import HALF_BYTES, SMALL_BYTES, PeerMemory  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.graphs import CudaGraphs  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Layout  # noqa: E402
from vibe_sgl_lite.model_worker.kv_pool import KVPool  # noqa: E402
from vibe_sgl_lite.model_worker.model_runner import ModelRunner  # noqa: E402
from vibe_sgl_lite.model_worker.weights import _DummySource  # noqa: E402
from vibe_sgl_lite.qwen3.checkpoint import Part  # noqa: E402
from vibe_sgl_lite.qwen3.layers import matrix, parallel_state  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState  # noqa: E402
from vibe_sgl_lite.qwen3.layers.rotary import RotaryEmbedding  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402

CPU, LARGE = torch.device("cpu"), 1 << 26


class DryGraphs(CudaGraphs):
    def run(self, key: Any, work: Callable[[], Any]) -> Any:
        return work()


def zero_small(source: _DummySource, parts: Sequence[Part], buffer: Tensor) -> None:
    """Codes are looked at when they are installed; pages of what is large should not be touched."""
    if buffer.numel() < LARGE:
        buffer.zero_()


def be_dry(takes: Callable[[str], bool]) -> None:
    """From now on this process launches nothing, and compiles the kernels that are taken."""
    nothing: Any = lambda *_, **__: None  # noqa: E731

    def launch(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if "ASM" in options:
                options["ASM"] = True  # as for tensors on a card
            known = len(kernel.device_caches[0][0])
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            if compiled is not None and len(kernel.device_caches[0][0]) > known and torch.cuda.is_available():
                with suppress(Exception):  # it has a compiler of its own
                    CudaLauncher(compiled.src, compiled.metadata)

        return call

    def skips(*, repr: str, key: object, **_: Any) -> bool:
        return not takes(f"{repr} {key}")

    def choose(dtype: torch.dtype, device: torch.device, head_dim: int, setup: Any) -> Any:
        return gpu_compute(device, setup)

    driver.set_active(NoCard())
    patches: list[tuple[Any, str, Any]] = [
        (JITFunction, "__getitem__", launch), (knobs.runtime, "jit_cache_hook", skips),
        (parallel_steps, "choose_compute", choose), (parallel_steps, "CudaGraphs", DryGraphs),
        (parallel_steps, "STEPS", 1), (parallel_steps, "TOKENS", 2), (torch.cuda, "synchronize", nothing),
        (F, "linear", lambda x, matrix, bias=None: x.new_empty((*x.shape[:-1], len(matrix)))),
        (dist, "all_reduce", nothing), (dist, "all_to_all_single", nothing),
        (parallel_state, "_all_gather_into", nothing), (matrix, "can_pack", lambda *_: False),
        (Tensor, "normal_", lambda x: x), (_DummySource, "read", zero_small),
    ]  # fmt: skip
    patches += [(m, "has_dependent_launch", lambda _: True) for m in (operations, attention_backend, collectives, draw)]
    for holder, name, value in patches:
        setattr(holder, name, value)


def states(group: str, rank: int, ranks: int) -> tuple[ParallelState, Any]:
    layout, no_group = Layout(HALF_BYTES, SMALL_BYTES, ranks), Any
    peers = PeerMemory([64] * ranks, rank, layout, CPU, None)
    all_ranks: Any = Group(rank, ranks, no_group, peers)  # type: ignore[arg-type]
    if group == "tp1":
        return ParallelState(), "all_reduce"
    if group == "tp":
        return ParallelState(rank, tp=all_ranks, expert_tp=replace(all_ranks, peers=None)), "all_reduce"
    state = ParallelState(rank, tp=all_ranks, ep=replace(all_ranks, peers=None))
    return state, "all_to_all" if group == "all-to-all" else "all_reduce"


def run_dry(shape: str, group: str, rank: int, options: Any) -> None:
    state, dispatch = states(group, rank, options.ranks)
    model, compute = parallel_steps.model_of(shape, state, CPU, dispatch, 1)
    rotary = model.config.rope_theta, model.dtype, CPU, model.config.context_limit, model.config.yarn
    model.rotary = RotaryEmbedding(model.config.head_dim, *rotary)
    if shape == options.engine:
        warm_up(model, state)
        return
    tiny = parallel_steps.draws(shape)
    rows = parallel_steps.TOKEN_ROWS if tiny else tuple(int(count) for count in options.rows.split(","))
    for variant in parallel_steps.variants_of(shape, group, options):
        with parallel_variants.vary(variant), torch.inference_mode():
            if tiny:
                steps = parallel_steps.steps_of(model, compute, rows)
                for count in rows:
                    steps.tokens(count)
            else:
                parallel_steps.measure(model, compute, rows, variant, 0)


def warm_up(model: Qwen3, state: ParallelState) -> None:
    """Of an engine of `ENGINE`'s settings."""
    config, size = model.config, state.tp.size
    rows, tokens = ENGINE["max_running_requests"], ENGINE["chunked_prefill_size"]
    group = config.num_attention_heads // size // config.local_kv_heads(size)
    made = gpu_compute(CPU, GpuSetup(group, config.vocab_size, rows, rows, tokens, tp=state.tp))
    assert made.graphs is not None
    made = replace(made, graphs=DryGraphs(made.graphs.row_buckets, made.graphs.chunk_buckets))
    pool = KVPool(config, size, 64, parallel_steps.PAGE, model.dtype, CPU, layout=made.kv_layout)
    runner = ModelRunner(model, pool, made, max_slots=rows, context_length=2048, max_tokens=rows + tokens)
    made.plan_layers(model, runner.backend)
    with torch.inference_mode():
        runner.warm_up()


def cases(shape: str, options: Any) -> list[tuple[str, int]]:
    moe = parallel_steps.has_experts(shape)
    return [
        (group, rank)
        for group, rank in itertools.product(options.groups.split(","), range(options.ranks))
        if (group != "tp1" or rank == 0) and (moe or group not in ("ep", "all-to-all"))
        if shape != options.engine or group == "tp"
    ]


def compile_steps(options: Any) -> None:
    """As parallel_steps.py's options say, with so many jobs, each of which takes a share of one shape's kernels; a
    shape that is named twice has twice as many."""
    began, children = time.monotonic(), list[int]()
    all_jobs = list(itertools.islice(itertools.cycle(options.shapes.split(",")), options.jobs))
    for job in range(options.jobs):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            shape = all_jobs[job]
            be_dry(partial(is_in_share, all_jobs[:job].count(shape), all_jobs.count(shape)))
            for group, rank in cases(shape, options):
                try:
                    run_dry(shape, group, rank, options)
                except Exception as error:  # noqa: BLE001 - the steps themselves will say it again
                    sys.stderr.write(f"  {shape} {group} {rank}: {error!r:.300}\n")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    print(f"kernels compiled by {options.jobs} processes in {time.monotonic() - began:.0f} s", flush=True)


def is_in_share(share: int, shares: int, name: str) -> bool:
    return crc32(name.encode()) % shares == share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", default="32B")
    parser.add_argument("--groups", default="tp1,tp")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--variants", default="ours")
    parser.add_argument("--engine", help="a shape")
    parser.add_argument("--compile", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    compiled: int = options.compile
    if options.jobs:
        compile_steps(options)
        return
    seen: set[str] = set()

    def takes(name: str) -> bool:
        if name in seen:
            return False
        seen.add(name)
        print(f"  {name:.90}", flush=True)
        return len(seen) <= compiled

    be_dry(takes)
    for shape in options.shapes.split(","):
        for group, rank in cases(shape, options):
            began, before = time.monotonic(), len(seen)
            run_dry(shape, group, rank, options)
            print(
                f"{shape} {group} rank {rank}: {len(seen) - before} new, {time.monotonic() - began:.1f} s", flush=True
            )


if __name__ == "__main__":
    main()
