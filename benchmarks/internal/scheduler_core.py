"""Speed of the scheduler core alone: no ranks, no sockets.

    python -m benchmarks.internal.scheduler_core [--rows 32,256,1024] [--steps 400]

Prints a table and, last, one JSON line. Times are CPU time of this thread, so other load on the machine hardly shows.

step_ms       one `schedule` + `complete` of pure decode, two steps in flight, as median and p99; `_waiting`: with 100
              more requests waiting that do not fit; `_turnover`: a load as it is served, prompts and outputs of 100 to
              1,024 tokens, the next one waiting when one ends, so that about a step in two has other rows than before
match_ms      a match of a 32,000-token prompt that is cached, in one piece and in pieces of 512 tokens
pairs_per_s   insertions of a 4-page prefix, each into a full cache and so with an eviction of as many pages
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from array import array
from collections import deque
from itertools import count

import msgspec

from vibe_sgl_lite.runtime.messages import AddRequest, StepResult, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.memory import PageAllocator
from vibe_sgl_lite.scheduler.radix_cache import RadixCache

PROMPT_TOKENS = 64
END_TOKEN = 1


def running_scheduler(rows: int, steps: int, waiting: int) -> Scheduler:
    """A scheduler with `rows` requests that all decode, and `waiting` ones for which there is no room."""
    pages = rows * (PROMPT_TOKENS + steps + 64) // 16 + rows
    scheduler = Scheduler(
        SchedulerConfig(
            num_pages=pages, max_running_requests=rows + 1, chunked_prefill_size=PROMPT_TOKENS * rows
        )
    )  # fmt: skip
    rng = random.Random(0)
    sampling = ResolvedSampling(**{**DEFAULTS, "seed": 0, "end_token_ids": (END_TOKEN,), "max_new_tokens": steps + 50})
    for uid in range(rows + waiting):
        size = PROMPT_TOKENS if uid < rows else pages * 16 - steps - 50
        prompt = pack_ids(rng.randrange(2, 150_000) for _ in range(size))
        rejected = scheduler.add(AddRequest(uid, str(uid), prompt, sampling), 0.0)
        assert rejected is None
    return scheduler


def step_seconds(rows: int, steps: int, waiting: int = 0) -> list[float]:
    """Seconds of each `schedule` + `complete` while all rows decode."""
    scheduler = running_scheduler(rows, steps, waiting)
    results: list[StepResult] = []
    times: list[float] = []
    ids = array("i", [7]) * rows
    packed = ids.tobytes()
    for number in range(steps):
        began = time.thread_time()
        batch = scheduler.schedule(float(number))
        assert batch is not None
        results.append(StepResult(batch.step, packed, total_s=0.01))
        if len(results) == 2:
            scheduler.complete(results.pop(0), float(number))
        if number > 5:
            times.append(time.thread_time() - began)
    assert scheduler.stats()["num_running"] == rows
    return times


def turnover_seconds(rows: int, steps: int) -> list[float]:
    """Seconds of each `schedule` + `complete` while ended requests are replaced, from when all rows are there."""
    scheduler = Scheduler(
        SchedulerConfig(num_pages=rows * 200, max_running_requests=rows, chunked_prefill_size=8192)
    )  # fmt: skip
    rng = random.Random(0)
    sampling = ResolvedSampling(**{**DEFAULTS, "seed": 0, "end_token_ids": (END_TOKEN,), "max_new_tokens": 1024})
    results: deque[StepResult] = deque()
    times: list[float] = []
    arrivals = count()
    while len(times) < steps:
        while len(scheduler.client_requests) < rows + 8:
            uid, size = next(arrivals), rng.randint(100, 1024)
            asked = msgspec.structs.replace(sampling, max_new_tokens=rng.randint(100, 1024))
            scheduler.add(
                AddRequest(uid, str(uid), pack_ids(rng.randrange(2, 150_000) for _ in range(size)), asked), 0.0
            )
        full = scheduler.stats()["num_running"] == rows
        began = time.thread_time()
        batch = scheduler.schedule(0.0)
        step = scheduler.newest_step
        scheduled = time.thread_time() - began
        assert batch is not None
        assert step is not None
        ids = [7] * len(step.decode) + [7 if chunk.samples else -1 for chunk in step.chunks]
        results.append(StepResult(batch.step, pack_ids(ids), total_s=0.01 + 3e-5 * step.work.tokens))
        if len(results) == 2:
            result = results.popleft()
            began = time.thread_time()
            scheduler.complete(result, 0.0)
            if full:
                times.append(time.thread_time() - began + scheduled)
    return times


def match_seconds(pieces: int, repeats: int = 200) -> float:
    """Seconds of one match of a cached 32,000-token prompt that was inserted in so many tokens a piece."""
    tokens = pack_ids(random.Random(0).randrange(150_000) for _ in range(32_000))
    cache = RadixCache(16, lambda pages: None)
    node, _ = cache.match("", tokens, 0)
    for first in range(0, 32_000, pieces):
        last = min(first + pieces, 32_000)
        node, _ = cache.insert(node, tokens[first * 4 : last * 4], array("i", range(first // 16, last // 16)))
    began = time.thread_time()
    for _ in range(repeats):
        _, pages = cache.match("", tokens, 32_000)
    seconds = (time.thread_time() - began) / repeats
    assert len(pages) == 2000
    return seconds


def pairs_per_second(pairs: int = 50_000) -> float:
    """Insertions into a full cache, each evicting as much as it adds."""
    allocator = PageAllocator(4096)
    cache = RadixCache(16, allocator.free)
    rng = random.Random(0)
    keys = [pack_ids(rng.randrange(1000) for _ in range(64)) for _ in range(pairs)]
    root, _ = cache.match("", b"", 0)
    cache.lock(root)
    began = time.thread_time()
    for key in keys:
        if allocator.num_free < 4:
            cache.evict(4)
        pages = array("i", allocator.allocate(4))
        _, held = cache.insert(root, key, pages)
        assert held == pages
    return pairs / (time.thread_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="32,256,1024", help="numbers of running rows, with commas")
    parser.add_argument("--steps", type=int, default=400, help="steps to time")
    args = parser.parse_args()

    figures: dict[str, float] = {}
    print(f"{'what':<44}{'median':>12}{'p99':>12}")
    for rows in (int(r) for r in args.rows.split(",")):
        loads = {
            "": step_seconds(rows, args.steps),
            "_waiting": step_seconds(rows, args.steps, waiting=100),
            "_turnover": turnover_seconds(rows, args.steps),
        }
        for load, times in loads.items():
            times.sort()
            median, p99 = statistics.median(times) * 1e3, times[int(len(times) * 0.99)] * 1e3
            name = f"step_ms_{rows}{load}"
            figures[name], figures[name + "_p99"] = round(median, 4), round(p99, 4)
            what = f"schedule + complete, {rows} rows {load.strip('_')}"
            print(f"{what:<44}{median:>9.3f} ms{p99:>9.3f} ms")
    for pieces in (32_000, 512):
        ms = match_seconds(pieces) * 1e3
        figures[f"match_ms_{pieces}"] = round(ms, 4)
        print(f"{f'match 32,000 tokens, cached by {pieces}':<44}{ms:>9.3f} ms")
    figures["pairs_per_s"] = round(pairs_per_second())
    print(f"{'insert + evict pairs':<44}{figures['pairs_per_s']:>9.0f} /s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
