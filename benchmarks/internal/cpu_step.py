"""Where one rank's step goes on a CPU: linears, attention, element-wise operations, head, sampling and Python.

    OMP_NUM_THREADS=2 python benchmarks/internal/cpu_step.py --model-path ../shared/models/qwen3-0.6b
    python benchmarks/internal/cpu_step.py --decode 16x192 --prefill 512 --steps 40

Runs the model runner alone, without the pipeline, on dummy weights. The parts are those of `--profile`
(model_worker/step_timer.py), `other` being Python between them. A part's time is the sum of each call's best over the
steps, so that what other processes do to a shared machine mostly drops out. `whole` is the best complete step as it
was. The machine's fma_fp32_gflops are of the target's own instructions. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/cpu_step.py` finds the packages

import vibe_sgl_lite.model_worker  # noqa: E402, F401, I001  before torch: settles how its threads wait
import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.internal.cpu_rates import fma_gflops  # noqa: E402
from benchmarks.machine import measure  # noqa: E402
from vibe_sgl_lite.model_worker.compute import choose_compute, torch_compute  # noqa: E402
from vibe_sgl_lite.model_worker.cpu.program import plan_programs  # noqa: E402
from vibe_sgl_lite.model_worker.cpu.targets import VARIABLE  # noqa: E402
from vibe_sgl_lite.model_worker.kv_pool import KVPool  # noqa: E402
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats  # noqa: E402
from vibe_sgl_lite.model_worker.model_runner import ModelRunner  # noqa: E402
from vibe_sgl_lite.model_worker.step_timer import StepTimer  # noqa: E402
from vibe_sgl_lite.model_worker.weights import load_dummy_weights  # noqa: E402
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState  # noqa: E402
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER  # noqa: E402
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve  # noqa: E402

PAGE = 16


class Recorder:
    """The stretches of time of every step of one measurement; its steps must be alike."""

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer
        self._owners: list[int] = []
        self._steps: list[Any] = []

    @property
    def parts(self) -> list[str]:
        return [*self._timer.names[1:], OTHER]

    def step(self, call: Callable[[], Any]) -> None:
        self._timer.take_segments()
        call()
        owners, seconds = self._timer.take_segments()
        assert not self._steps or self._owners == owners.tolist(), "steps differ"
        self._owners = owners.tolist()
        self._steps.append(seconds)

    def result(self) -> dict[str, float]:
        """Milliseconds of each part, their sum, and of the best whole step; forgets the steps."""
        seconds = np.array(self._steps)
        self._steps = []
        best = np.bincount(self._owners, weights=seconds.min(0), minlength=len(self._timer.names)) * 1e3
        parts = dict(zip(self._timer.names, best, strict=True))
        return {part: round(float(parts[part]), 3) for part in self.parts} | {
            "sum": round(float(best.sum()), 2),
            "whole": round(float(seconds.sum(1).min()) * 1e3, 2),
        }


def build(
    folder: Path, dtype: torch.dtype, pages: int, slots: int, context: int, *, plain: bool, quantization: str
) -> tuple[ModelRunner, Recorder]:
    config, device = ModelConfig.from_folder(folder), torch.device("cpu")
    compute = torch_compute() if plain else choose_compute(dtype, device, config.head_dim)
    model = Qwen3(config, ParallelState(), dtype, device, compute.operations)
    choose_formats(model, quantization, compute.kernels)
    load_dummy_weights(model, 0)
    print(f"{compute.name}, {weight_bytes(model) / 1e9:.2f} GB of weights, {torch.get_num_threads()} threads")
    pool = KVPool(config, 1, pages, PAGE, dtype, device)
    rows = torch.randn(pool.data.shape[0], 1, 1, *pool.data.shape[3:], dtype=torch.float32)
    pool.data.copy_(rows.to(dtype))  # real pages, not the zero page
    timer = StepTimer()
    runner = ModelRunner(
        model,
        pool,
        compute,
        max_slots=slots,
        context_length=context,
        timer=timer,
    )
    plan_programs(model, runner.backend)
    runner.warm_up()  # also names the parts
    return runner, Recorder(timer)


def admit(runner: ModelRunner, slot: int, first_page: int, length: int, computed: int, room: int) -> NewSlot:
    sampling = resolve(
        SamplingParams(temperature=0.0, seed=0, max_new_tokens=1), model_defaults={}, end_token_ids=(),
        prompt_tokens=1, context_length=length + room, vocab_size=runner.model.config.vocab_size,
    )  # fmt: skip
    ids = np.random.default_rng(slot).integers(0, runner.model.config.vocab_size, length)
    pages = range(first_page, first_page + -(-(length + room) // PAGE))
    return NewSlot(slot, slot, pack_ids(ids.tolist()), length, computed, pack_ids(pages), sampling)


def decode(runner: ModelRunner, recorder: Recorder, batch: int, context: int, steps: int) -> dict[str, float]:
    """`batch` rows that decode one token each; their contexts end at `context`."""
    length, each = context - steps, -(-context // PAGE)
    new = [admit(runner, slot, slot * each, length, length - 1, steps) for slot in range(batch)]
    rows = pack_ids(range(batch))
    runner.run(ForwardBatch(0, released=rows, new=new, row_slots=rows, row_tokens=pack_ids([1] * batch)))
    for step in range(1, steps):
        message = ForwardBatch(step)
        recorder.step(lambda message=message: runner.run(message))  # type: ignore[misc]
    return recorder.result()


def prefill(runner: ModelRunner, recorder: Recorder, length: int, steps: int) -> dict[str, float]:
    """One prompt of `length` tokens in one step."""
    slot = pack_ids([0])
    for step in range(steps + 1):
        new = [admit(runner, 0, 0, length, 0, 1)]
        message = ForwardBatch(step, released=slot, new=new, row_slots=slot, row_tokens=pack_ids([length]))
        if step == 0:
            runner.run(message)
        else:
            recorder.step(lambda message=message: runner.run(message))  # type: ignore[misc]
    return recorder.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(ROOT.parent / "shared" / "models" / "qwen3-0.6b"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decode", nargs="*", default=["1x192", "8x192", "16x192", "32x192", "1x2048", "16x2048"],
                        metavar="ROWSxCONTEXT")  # fmt: skip
    parser.add_argument("--prefill", nargs="*", type=int, default=[512], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each (30; a sixth of it for prefill)")
    parser.add_argument("--plain-torch", action="store_true", help="the fallback without compiled kernels")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure the machine")
    parser.add_argument("--target", help="the kernels' instruction set (model_worker/cpu/targets.py); default the best")
    options = parser.parse_args()
    if options.target is not None:
        os.environ[VARIABLE] = options.target
    shapes = [tuple(map(int, text.split("x"))) for text in options.decode]
    longest = max([c for _, c in shapes] + [n + 1 for n in options.prefill])
    pages = max([b * -(-c // PAGE) for b, c in shapes] + [-(-(n + 1) // PAGE) for n in options.prefill])
    result: dict[str, Any] = {} if options.no_ceilings else {"machine": measure()}
    if "machine" in result and platform.machine() == "x86_64":
        result["machine"]["fma_fp32_gflops"] = round(fma_gflops(options.target, torch.get_num_threads()))
    print(result.get("machine", ""))
    slots = max([b for b, _ in shapes], default=1)
    runner, recorder = build(
        Path(options.model_path),
        getattr(torch, options.dtype),
        pages,
        slots,
        longest,
        plain=options.plain_torch,
        quantization=options.quantization,
    )
    print(f"{'ms':>14}" + "".join(f"{part:>10}" for part in (*recorder.parts, "sum", "whole")))
    with torch.inference_mode():
        for batch, context in shapes:
            name = f"decode {batch}x{context}"
            result[name] = decode(runner, recorder, batch, context, options.steps + 1)
            print(f"{name:>14}" + "".join(f"{value:>10.2f}" for value in result[name].values()), flush=True)
        for length in options.prefill:
            name = f"prefill {length}"
            result[name] = prefill(runner, recorder, length, max(3, options.steps // 6))
            print(f"{name:>14}" + "".join(f"{value:>10.2f}" for value in result[name].values()), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
