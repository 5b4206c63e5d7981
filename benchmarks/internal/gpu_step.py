r"""How long a step of decode rows takes on a GPU, and which kernels take it; the runner alone, without other processes.

    python benchmarks/internal/gpu_step.py --model-path qwen3-0.6b
    python benchmarks/internal/gpu_step.py --model-path qwen3-0.6b --rows 256,64 --kv-cache-dtype int8 --kernels 20
    python benchmarks/internal/gpu_step.py --model-path qwen3-0.6b --rows 64 --chunk 512,1024
    python benchmarks/internal/gpu_step.py --model-path qwen3-8b --rows 256,64,1 --form plain,awq,fp8

Random weights, in bf16; rows of 200 to 1,520 tokens, 860 on average, in scattered pages of 64; temperature 0.6. Three
steps are in flight, as in the engine. The floor is the step's bytes over the rate that `gpu_offline.py` measures on the
same card. --chunk: with a prompt of so many tokens in every step, without a floor. --form: matrices as those of such a
checkpoint are kept, `awq` as GPTQ's with 4 bits; `int4` is `--quantization int4`. --kernels: also those that take most,
microseconds a step. Prints a line for each number of rows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_step.py` finds the packages

from benchmarks.gpu_offline import measure_card  # noqa: E402
from vibe_sgl_lite.model_worker.compute import GpuSetup, choose_compute  # noqa: E402
from vibe_sgl_lite.model_worker.kv_pool import KVPool, bytes_per_token  # noqa: E402
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats  # noqa: E402
from vibe_sgl_lite.model_worker.model_runner import ModelRunner  # noqa: E402
from vibe_sgl_lite.model_worker.pending_step import PendingStep  # noqa: E402
from vibe_sgl_lite.model_worker.weights import load_dummy_weights  # noqa: E402
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve  # noqa: E402

PAGE, CONTEXT, IN_FLIGHT, STEPS = 64, 2048, 3, 200
FORMS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}


class Rows:
    """A runner with so many rows that decode."""

    def __init__(self, runner: ModelRunner, count: int, pages: int) -> None:
        choose = random.Random(0)
        self.runner, self.count, self.step = runner, count, 0
        self.lengths = [choose.randint(200, 1520) for _ in range(count)]
        free = choose.sample(range(pages), pages)
        self._free = free
        new = [self._slot(slot, length, choose) for slot, length in enumerate(self.lengths)]
        self._batch: dict[str, Any] = {"row_slots": pack_ids(range(count)), "row_tokens": pack_ids([1] * count)}
        self._chunk: dict[str, Any] = {}
        runner.run(ForwardBatch(0, new=new, **self._batch))

    def _slot(self, slot: int, length: int, choose: random.Random, computed: int | None = None) -> NewSlot:
        sampling = resolve(
            SamplingParams(max_new_tokens=1, temperature=0.6, top_p=1.0, top_k=-1, min_p=0.0, seed=slot),
            model_defaults={},
            end_token_ids=(),
            prompt_tokens=1,
            context_length=CONTEXT,
            vocab_size=self.runner.model.config.vocab_size,
        )
        ids = pack_ids(choose.randrange(10_000) for _ in range(length))
        pages = pack_ids(self._free.pop() for _ in range(-(-min(length + 2 * STEPS, CONTEXT) // PAGE)))
        return NewSlot(slot, slot, ids, length, length - 1 if computed is None else computed, pages, sampling)

    def add_chunk(self, tokens: int) -> None:
        """From now on each step also runs a prompt of so many."""
        slot = self._slot(self.count, tokens, random.Random(1), computed=0)
        self._chunk = {"released": pack_ids([self.count]), "new": [slot]}
        self._batch["row_slots"] += pack_ids([self.count])
        self._batch["row_tokens"] += pack_ids([tokens])

    def run(self, steps: int) -> float:
        """Seconds a step."""
        pending: deque[PendingStep] = deque()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step += 1
            if len(pending) == IN_FLIGHT:
                self.runner.collect(pending.popleft())
            pending.append(self.runner.launch(ForwardBatch(self.step, **self._chunk, **self._batch)))
        while pending:
            self.runner.collect(pending.popleft())
        return (time.perf_counter() - begin) / steps

    def release(self) -> None:
        none: dict[str, Any] = {"row_slots": b"", "row_tokens": b""}
        self.runner.run(ForwardBatch(self.step + 1, released=self._batch["row_slots"], **none))


def kernels(rows: Rows, most: int) -> None:
    steps = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        rows.run(steps)
    averages = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    averages.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in averages) / steps
    print(f"    kernels, overlaps counted twice: {total:.0f} us a step")
    for event in averages[:most]:
        took = event.self_device_time_total / steps
        print(f"    {took:9.1f} us {event.count / steps:7.1f} x {event.key[:110]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rows", default="256,192,128,96,64,32,16,8,4,1")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8", "int8"))
    parser.add_argument("--chunk", default="0")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--form", default="plain", help=f"plain, {', '.join(FORMS)}, int4, with commas between")
    options = parser.parse_args()
    card = measure_card()
    for form in options.form.split(","):
        measure(options, form, card)
        gc.collect()
        torch.cuda.empty_cache()


def config_of(folder: Path, form: str) -> ModelConfig:
    """That of the folder, with the quantization_config of a form."""
    if form not in FORMS:
        return ModelConfig.from_folder(folder)
    with tempfile.TemporaryDirectory() as made:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": FORMS[form]}
        (Path(made) / "config.json").write_text(json.dumps(config))
        return ModelConfig.from_folder(made)


def measure(options: argparse.Namespace, form: str, card: dict[str, Any]) -> None:
    """Prints a line for each number of rows."""
    counts = [int(count) for count in options.rows.split(",")]
    device, eight_bits = torch.device("cuda", 0), options.kv_cache_dtype != "auto"
    config = config_of(options.model_path, form)
    group, most = config.num_attention_heads // config.num_key_value_heads, max(counts)
    chunk_sizes = [int(tokens) for tokens in options.chunk.split(",")]
    most_tokens = max(chunk_sizes)
    fixed, fp8 = options.deterministic, options.kv_cache_dtype == "fp8"
    setup = GpuSetup(group, config.vocab_size, most + 1, most + 1, most_tokens, fp8=fp8, fixed_order=fixed)
    compute = choose_compute(torch.bfloat16, device, config.head_dim, setup)
    model = Qwen3(config, ParallelState(), torch.bfloat16, device, compute.operations)
    choose_formats(model, form if form == "int4" else "none", None, fixed_order=fixed)
    load_dummy_weights(model, 0, lambda done, total: None)
    pages = (most + 1) * CONTEXT // PAGE
    pool = KVPool(config, 1, pages, PAGE, torch.bfloat16, device, int8=eight_bits, layout=compute.kv_layout)
    pool.data.random_(-64, 64) if eight_bits else pool.data.normal_()
    runner = ModelRunner(model, pool, compute, max_slots=most + 1, context_length=CONTEXT, max_tokens=4096)
    compute.plan_layers(model, runner.backend)
    began = time.perf_counter()
    runner.warm_up()
    took = time.perf_counter() - began
    size = weight_bytes(model) / 2**30
    print(f"{form}, {size:.2f} GiB, {card}; warm-up {took:.1f} s; {options.kv_cache_dtype}", flush=True)
    kv_bytes = bytes_per_token(config, 1, torch.bfloat16, int8=eight_bits)
    for count, tokens in itertools.product(counts, chunk_sizes):
        rows = Rows(runner, count, pages)
        if tokens:
            rows.add_chunk(tokens)
        rows.run(20)
        took = min(rows.run(STEPS // 2) for _ in range(2))
        read = weight_bytes(model) + kv_bytes * (sum(rows.lengths) + count * STEPS // 2)
        floor = read / card["read_gb_s"] / 1e9
        beside = f", floor {floor * 1e3:.3f}, {floor / took:.0%}" if not tokens else f" with a chunk of {tokens}"
        print(f"{count:4} rows: {took * 1e3:.3f} ms a step{beside}", flush=True)
        if options.kernels:
            kernels(rows, options.kernels)
        rows.release()


if __name__ == "__main__":
    main()
