"""A workload on our own engine, as its users run it: an `LLM` pipeline of processes, one client streaming from it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.processes import peak_memory
from benchmarks.report import Timeline, summarize
from benchmarks.workloads import PREFILL_LEN, Workload, prefill_prompt
from vibe_sgl_lite import LLM, AsyncClient, SamplingParams


def run_engine(workload: Workload, vocab_size: int, flags: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Start the engine with `flags`, warm it up, run the workload; the report's keys plus what the engine said."""
    start = time.perf_counter()
    with LLM(**flags) as llm:
        startup = time.perf_counter() - start
        progress("engine is up")
        result, timelines = asyncio.run(_measure(llm.address, workload, vocab_size, progress))
        memory = peak_memory()
        stats = llm.stats()
    result |= {"startup_s": round(startup, 2), "peak_rss_mb": round(sum(memory.values()))}
    result |= {"peak_rss_mb_by_process": memory, "num_retractions": stats["num_retractions"]}
    assert [len(t.tokens) for t in timelines] == workload.output_lens
    return result


async def _measure(
    address: str, workload: Workload, vocab_size: int, progress: Any
) -> tuple[dict[str, Any], list[Timeline]]:
    async with AsyncClient(address=address) as client:
        await _stream(client, prefill_prompt(vocab_size, 99, 32), 4, 0.0)  # warm-up
        prefill = []
        for n in range(3):
            begin = time.perf_counter()
            timeline = await _stream(client, prefill_prompt(vocab_size, n), 1, begin)
            prefill.append(timeline.tokens[0])
        progress("workload runs")
        begin = time.perf_counter()
        streams = [_stream(client, p, n, begin) for p, n in zip(workload.prompts, workload.output_lens, strict=True)]
        timelines = await asyncio.gather(*streams)
    return summarize(timelines, prefill, PREFILL_LEN), timelines


async def _stream(client: AsyncClient, ids: list[int], output_len: int, begin: float) -> Timeline:
    params = SamplingParams(max_new_tokens=output_len, temperature=0, ignore_eos=True)
    submitted = time.perf_counter() - begin
    tokens: list[float] = []
    async for chunk in client.stream(input_ids=ids, sampling_params=params):
        tokens += [time.perf_counter() - begin] * len(chunk.token_ids)
    return Timeline(submitted=submitted, tokens=tokens)
