r"""How long steps take on one GPU and on several, and which kernels take it; the runners alone, without the engine.

    python benchmarks/internal/parallel_steps.py --shapes 32B,8B,4B
    python benchmarks/internal/parallel_steps.py --shapes 32B --rows 64 --kernels 12 --variants ours,cublas,unsent
    python benchmarks/internal/parallel_steps.py --shapes 30B-A3B --groups tp1,tp,ep,all-to-all

Dummy weights in bf16 of published shapes, or in blocks of fp8 as 30B-A3B-FP8. Decode: rows of 24 to some 100 tokens,
captured, three steps in flight as in the engine; prefill: a step of 4 prompts of 1,024, not captured. groups: tp1 one
GPU alone, tp all, ep the same with experts split, all-to-all the same with tokens sent to experts. variants: ours,
filtered with top-k and top-p as Qwen3 has them, and others for dense layers of several GPUs (at the end of --help, or
parallel_variants.py); e8@16/64 is for these numbers of rows alone, and a second list behind ; for the shapes after the
first. --kernels: also what takes the first rank's time, microseconds a step. The floor is reading a rank's weights, of
experts those that tokens at random touch. Prints a line for each.

Shapes tiny and tiny-moe, the checkpoints, and such as 32B-fp32, two layers of dummy weights: no times, but whether
what they draw in float32 is the same in all groups. What they launch can be compiled beforehand by many processes at
once: internal/dry_steps.py.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/parallel_steps.py` finds the packages

from benchmarks.gpu_offline import FILTERED, PLAIN, measure_card  # noqa: E402
from benchmarks.internal import parallel_variants  # noqa: E402
from benchmarks.parallel_gpu import DENSE, MOE, floor_ms  # noqa: E402
from benchmarks.parallel_gpu import SHAPES as PLAIN_SHAPES  # noqa: E402
from vibe_sgl_lite.model_worker.compute import GpuSetup, choose_compute  # noqa: E402
from vibe_sgl_lite.model_worker.gpu.graphs import CudaGraphs  # noqa: E402
from vibe_sgl_lite.model_worker.kv_pool import KVPool  # noqa: E402
from vibe_sgl_lite.model_worker.matrix_formats import keep_as_codes  # noqa: E402
from vibe_sgl_lite.model_worker.model_runner import ModelRunner  # noqa: E402
from vibe_sgl_lite.model_worker.parallel import build_state, init_parallel, join_peers  # noqa: E402
from vibe_sgl_lite.model_worker.pending_step import PendingStep  # noqa: E402
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights  # noqa: E402
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids, unpack_ids  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve  # noqa: E402

PAGE, CONTEXT, IN_FLIGHT, LENGTH, STEPS, PROMPTS, PROMPT = 64, 2048, 3, 24, 20, 4, 1024
TOKENS, TOKEN_ROWS = 24, (1, 2, 4, 8)
TINY = {"tiny": DENSE, "tiny-moe": MOE}
FLOAT32, FP8 = "-fp32", "-FP8"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SHAPES = PLAIN_SHAPES | {
    shape + FP8: config | {"quantization_config": BLOCKS} for shape, config in PLAIN_SHAPES.items()
}
PARTS = {  # of kernels' names, for the table
    "sums": ("all_reduce", "all_gather", "nccl"),
    "attention": ("attention", "rope"),
    "experts": ("grouped", "sort_pairs", "combine", "route"),
    "sampling": ("chunk_maxima", "draw", "expand"),
    "norm, SiLU": ("rms_norm", "silu"),
}


class Steps:
    """A runner, driven as a scheduler does."""

    def __init__(self, runner: ModelRunner, pages: int) -> None:
        self.runner, self.pages, self.step, self.sampling = runner, pages, 0, PLAIN

    def _new(
        self, slot: int, length: int, computed: int, first_page: int, count: int, chosen: dict[str, Any] = PLAIN
    ) -> NewSlot:
        sampling = resolve(
            SamplingParams(max_new_tokens=1, seed=slot, **chosen),
            model_defaults={}, end_token_ids=(), prompt_tokens=1, context_length=CONTEXT,
            vocab_size=self.runner.model.config.vocab_size,
        )  # fmt: skip
        pages = [(first_page + page) % self.pages for page in range(count)]
        most = min(10_000, self.runner.model.config.vocab_size)
        ids = pack_ids((slot * 997 + place * 31) % most for place in range(length))
        return NewSlot(slot, slot, ids, length, computed, pack_ids(pages), sampling)

    def _run(self, batches: Iterator[dict[str, Any]]) -> float:
        pending: deque[PendingStep] = deque()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch in batches:
            self.step += 1
            if len(pending) == IN_FLIGHT:
                self.runner.collect(pending.popleft())
            pending.append(self.runner.launch(ForwardBatch(self.step, **batch)))
        while pending:
            self.runner.collect(pending.popleft())
        return time.perf_counter() - begin

    def decode(self, rows: int, kernels: int) -> tuple[float, list[str]]:
        """Seconds a step, and a table."""
        new = [self._new(slot, LENGTH, LENGTH - 1, 2 * slot, 2, self.sampling) for slot in range(rows)]
        same = {"row_slots": pack_ids(range(rows)), "row_tokens": pack_ids([1] * rows)}
        self._run(iter([{"new": new, **same}, *[same] * 4]))
        took = [self._run(iter([same] * STEPS)) / STEPS for _ in range(2)]
        table = list[str]()
        if kernels:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                self._run(iter([same] * 4))
            table = describe(profile, 4, kernels)
        self._run(iter([{"released": same["row_slots"], "row_slots": b"", "row_tokens": b""}]))
        return min(took), table

    def tokens(self, rows: int) -> list[list[int]]:
        """What so many rows draw: the likeliest, any, and by Qwen3's own filters."""
        slots = pack_ids(range(rows))
        kinds = PLAIN | {"temperature": 0.0}, PLAIN | {"temperature": 0.9}, FILTERED
        new = [self._new(slot, 3 + 5 * slot, 0, 2 * slot, 2, kinds[(slot + rows) % 3]) for slot in range(rows)]
        batch: dict[str, Any] = {
            "new": new,
            "row_slots": slots,
            "row_tokens": pack_ids([3 + 5 * slot for slot in range(rows)]),
        }
        drawn = []
        for _ in range(TOKENS):
            self.step += 1
            drawn.append(list(unpack_ids(self.runner.run(ForwardBatch(self.step, **batch)).token_ids)))
            batch = {"row_slots": slots, "row_tokens": pack_ids([1] * rows)}
        self._run(iter([{"released": slots, "row_slots": b"", "row_tokens": b""}]))
        return [list(row) for row in zip(*drawn, strict=True)]

    def prefill(self) -> float:
        """Seconds a step."""
        same = {"row_slots": pack_ids(range(PROMPTS)), "row_tokens": pack_ids([PROMPT] * PROMPTS)}
        each = PROMPT // PAGE + 1
        new = [self._new(slot, PROMPT, 0, each * slot, each) for slot in range(PROMPTS)]
        again = {"released": same["row_slots"], "new": new, **same}
        self._run(iter([{"new": new, **same}, again]))
        took = [self._run(iter([again] * 3)) / 3 for _ in range(2)]
        self._run(iter([{"released": same["row_slots"], "row_slots": b"", "row_tokens": b""}]))
        return min(took)


def describe(profile: Any, steps: int, most: int) -> list[str]:
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    parts = dict.fromkeys([*PARTS, "products and the rest"], 0.0)
    for event in events:
        name = event.key.lower()
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), [*parts][-1])
        parts[part] += event.self_device_time_total / steps
    lines = ["    " + ", ".join(f"{part} {took:.0f}" for part, took in parts.items() if took) + " us, overlaps twice"]
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:most]:
        took = event.self_device_time_total / steps
        lines.append(f"    {took:9.1f} us {event.count / steps:7.1f} x {event.key[:90]}")
    return lines


def draws(shape: str) -> bool:
    return shape in TINY or shape.endswith(FLOAT32)


def has_experts(shape: str) -> bool:
    return shape == "tiny-moe" or "num_experts" in SHAPES.get(shape.removesuffix(FLOAT32), {})


def config_of(shape: str, layers: int | None) -> ModelConfig:
    if shape in TINY:
        return ModelConfig.from_folder(TINY[shape])
    if shape.endswith(FLOAT32):
        shape, layers = shape.removesuffix(FLOAT32), 2
    with tempfile.TemporaryDirectory() as folder:
        kept = {} if layers is None else {"num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape] | kept))
        return ModelConfig.from_folder(Path(folder))


def model_of(
    shape: str, parallel: ParallelState, device: torch.device, dispatch: DispatchKind, layers: int | None
) -> tuple[Qwen3, Any]:
    config, size = config_of(shape, layers), parallel.tp.size
    group = config.num_attention_heads // size // config.local_kv_heads(size)
    dtype = torch.float32 if draws(shape) else torch.bfloat16

    def compute(rows: tuple[int, ...]) -> Any:
        most = max(*rows, PROMPTS) + 1
        setup = GpuSetup(group, config.vocab_size, most, most, tp=parallel.tp)
        made = choose_compute(dtype, device, config.head_dim, setup)
        return replace(made, graphs=CudaGraphs(rows, ()))

    model = Qwen3(config, parallel, dtype, device, compute((1,)).operations, dispatch)
    keep_as_codes(model, everything=False)
    if shape in TINY:
        load_weights(model, TINY[shape])
    else:
        load_dummy_weights(model, 0, lambda done, total: None)
    return model, compute


def steps_of(model: Qwen3, compute: Any, rows: tuple[int, ...]) -> Steps:
    made = compute(rows)
    pages = 2 * max(rows) + 2 + PROMPTS * (PROMPT // PAGE + 1)
    size, device = model.parallel.tp.size, model.device
    pool = KVPool(model.config, size, pages, PAGE, model.dtype, device, layout=made.kv_layout)
    pool.data.normal_()
    slots, most_tokens = max(*rows, PROMPTS) + 1, PROMPTS * PROMPT + max(rows)
    runner = ModelRunner(model, pool, made, max_slots=slots, context_length=CONTEXT, max_tokens=most_tokens)
    made.plan_layers(model, runner.backend)
    backend: Any = runner.backend
    contexts = backend.graph_contexts()[:1]  # no other is met here
    backend.graph_contexts = lambda: contexts
    backend._compiled = True  # nor the other numbers of rows
    runner.warm_up()
    return Steps(runner, pages)


def measure(model: Qwen3, compute: Any, rows: tuple[int, ...], variant: str, kernels: int) -> dict[str, Any]:
    """With the rows of those that the variant is for."""
    wanted = variant.partition("@")[2]
    rows = tuple(count for count in rows if not wanted or str(count) in wanted.split("/"))
    if not rows:
        return {}
    steps = steps_of(model, compute, rows)
    steps.sampling = FILTERED if variant.startswith("filtered") else PLAIN
    result: dict[str, Any] = {str(count): (steps.decode(count, 0)[0], list[str]()) for count in rows}
    if variant == "ours":
        result["prompt tok/s"] = PROMPTS * PROMPT / steps.prefill()
        for count in rows if kernels else ():  # now that all is timed
            result[str(count)][1].extend(steps.decode(count, kernels)[1])
    return result


def work(rank: int, options: Any, store_path: Path) -> None:
    device, ranks = torch.device("cuda", rank), options.ranks
    torch.cuda.set_device(device)
    parallel = join_peers(init_parallel(rank, ranks, 1, device, store_path), device)
    store = FileStore(f"{store_path}-turns", ranks)
    card = {"read_gb_s": options.read_gb_s}
    if rank == 0:
        card = measure_card() if options.read_gb_s is None else card
        print(torch.cuda.get_device_name(), card, flush=True)
    base: dict[str, Any] = {}
    for shape, group in itertools.product(options.shapes.split(","), options.groups.split(",")):
        turn = f"{shape} {group}"
        if group in ("ep", "all-to-all") and not has_experts(shape):
            continue
        if group == "tp1" and rank > 0:
            store.wait([turn])
            continue
        state, dispatch = state_of(group, parallel, rank, ranks)
        rows = TOKEN_ROWS if draws(shape) else tuple(int(count) for count in options.rows.split(","))
        model, compute = model_of(shape, state, device, dispatch, options.layers)
        for variant in variants_of(shape, group, options):
            with parallel_variants.vary(variant):
                if draws(shape):
                    steps = steps_of(model, compute, rows)
                    drawn = [tokens for count in rows for tokens in steps.tokens(count)]
                    one = base.setdefault(shape, drawn)
                    same = sum(a == b for a, b in zip(drawn, one, strict=True))
                    if rank == 0:
                        print(f"{turn} {variant}: {same} of {len(one)} rows as with the first group", flush=True)
                    continue
                result = measure(model, compute, rows, variant, options.kernels)
            gc.collect()
            torch.cuda.empty_cache()
            if rank == 0:
                report(turn, variant, result, base, card, state.tp.size)
        del model, compute
        gc.collect()
        torch.cuda.empty_cache()
        if group == "tp1":
            store.set(turn, "done")
    if ranks > 1:
        dist.barrier()


def state_of(group: str, parallel: ParallelState, rank: int, ranks: int) -> tuple[ParallelState, DispatchKind]:
    if group == "tp1":
        return ParallelState(), "all_reduce"
    if group == "tp":
        return parallel, "all_reduce"
    return replace(
        build_state(rank, ranks, ranks), tp=parallel.tp
    ), "all_to_all" if group == "all-to-all" else "all_reduce"


def variants_of(shape: str, group: str, options: Any) -> list[str]:
    """Most are of dense layers of ranks."""
    lists, number = options.variants.split(";"), options.shapes.split(",").index(shape)
    variants: list[str] = lists[min(number, len(lists) - 1)].split(",")
    if draws(shape):
        return ["ours"]
    if group == "tp1" or has_experts(shape):
        return [variant for variant in variants if variant.startswith(("ours", "filtered"))]
    return variants


def report(
    turn: str, variant: str, result: dict[str, Any], base: dict[str, float], card: dict[str, Any], ranks: int
) -> None:
    shape, cells, tables = turn.split()[0], [], []
    for name, value in result.items():
        if name == "prompt tok/s":
            ratio = value / base.setdefault(f"{shape} {name}", value)
            cells.append(f"{name} {value:,.0f} {ratio:.2f} x")
            continue
        took, table = value
        ratio = base.setdefault(f"{shape} {name}", took) / took
        share = floor_ms(SHAPES[shape], int(name), card["read_gb_s"]) / ranks / took / 1e3
        cells.append(f"{name}: {took * 1e3:.3f} ms {ratio:.2f} x {share:.0%}")
        tables += [f"  {name} rows:", *table] if table else []
    print(f"{turn} {variant} | " + " | ".join(cells), *tables, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=parallel_variants.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", default="32B,8B,4B")
    parser.add_argument("--groups", default="tp1,tp")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--variants", default="ours")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--layers", type=int, help="in place of as many as the shape has")
    parser.add_argument("--read-gb-s", type=float, help="of a card; measured if it is not given")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.rank, options, options.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        others = [
            subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank), "--store", str(store)])
            for rank in range(1, options.ranks)
        ]
        try:
            work(0, options, store)
        finally:
            for other in others:
                other.kill()
        sys.stdout.flush()
    os._exit(0)  # else NCCL looks for those that are gone


if __name__ == "__main__":
    main()
