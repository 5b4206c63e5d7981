"""The same workload on vLLM's CPU build, in a process of its own and in vLLM's own environment.

Reads a JSON job on stdin (as benchmarks/transformers_run.py does, plus cores: the CPU ids to bind), writes one JSON
line on stdout. Needs vLLM and, of this tree, only report.py, workloads.py and processes.py. Every core is bound by hand
and none kept back for vLLM's other processes, which it would do by itself: on two cores that doubles its speed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import msgspec
import psutil

from benchmarks.processes import peak_mb, peak_memory
from benchmarks.report import Timeline, summarize
from benchmarks.workloads import PREFILL_LEN, Workload, prefill_prompt


def prepare(cores: list[int]) -> None:
    """vLLM reads these when it is imported and when it starts its processes. What the caller has set, stays."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    # By default version 0.32 cannot read back what it compiled, and compiles for 100 s at every start; so it can.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def start(job: dict[str, Any], workload: Workload) -> Any:
    """The engine, compiled and warm. Prefix caching is off: every prompt here is new, so it could only cost."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    longest = max(len(p) + n for p, n in zip(workload.prompts, workload.output_lens, strict=True))
    args = AsyncEngineArgs(
        model=job["model_folder"],
        load_format=job["load_format"],
        dtype=job["dtype"],
        seed=job["seed"],
        max_model_len=max(longest, PREFILL_LEN + 1),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    return AsyncLLM.from_engine_args(args)


async def stream(engine: Any, ids: list[int], output_len: int, begin: float, name: str) -> Timeline:
    from vllm import SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    params = SamplingParams(
        max_tokens=output_len, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )  # fmt: skip
    submitted = time.perf_counter() - begin
    tokens: list[float] = []
    async for output in engine.generate({"prompt_token_ids": ids}, params, name):
        tokens += [time.perf_counter() - begin] * len(output.outputs[0].token_ids)
    assert len(tokens) == output_len, f"{name}: {len(tokens)} tokens, {output_len} asked for"
    return Timeline(submitted=submitted, tokens=tokens)


async def measure(job: dict[str, Any], workload: Workload) -> dict[str, Any]:
    import vllm

    begin = time.perf_counter()
    engine = start(job, workload)
    startup = time.perf_counter() - begin
    vocab = job["vocab_size"]
    try:
        await stream(engine, prefill_prompt(vocab, 99, 32), 4, 0.0, "warm-up")
        prefill = []
        for n in range(3):
            begin = time.perf_counter()
            lone = await stream(engine, prefill_prompt(vocab, n), 1, begin, f"prefill {n}")
            prefill.append(lone.tokens[0])
        begin = time.perf_counter()
        work = zip(workload.prompts, workload.output_lens, strict=True)
        streams = [stream(engine, ids, n, begin, f"request {i}") for i, (ids, n) in enumerate(work)]
        timelines = await asyncio.gather(*streams)
        memory = peak_memory() | {"front end": round(peak_mb(psutil.Process()), 1)}
    finally:
        engine.shutdown()
    return summarize(timelines, prefill, PREFILL_LEN) | {
        "startup_s": round(startup, 2),
        "peak_rss_mb": round(sum(memory.values())),
        "version": vllm.__version__,
        "settings": {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "LD_PRELOAD"))},
    }


def main() -> None:
    # vLLM's processes write to stdout too: the result keeps the real one, everything else goes to stderr.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        workload = msgspec.convert(job["workload"], Workload)
        prepare(job["cores"])
        print(json.dumps(asyncio.run(measure(job, workload))), file=out)


if __name__ == "__main__":
    main()
