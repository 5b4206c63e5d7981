"""What the prefix cache on disk brings: time to the first token behind a long prefix after a restart, and its price.

    python benchmarks/internal/disk_cache.py --model-path ../shared/models/qwen3-0.6b --load-format dummy

Engines start one after the other, each with a short prompt first, and are asked for one token behind each of the same
prefixes, one right after the other:

plain   without --cache-dir: all is computed
first   with an empty --cache-dir: all is computed, and stored meanwhile
warm    started again: all is loaded, out of the system's file cache
disk    the same, after the system was told to forget the files

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/disk_cache.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags, vocab_size_of  # noqa: E402
from benchmarks.workloads import prefill_prompt  # noqa: E402
from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

STORED_S = 120.0
ONE = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)


def measure(
    settings: dict[str, Any], prompts: list[list[int]], short: list[int], idle_s: float, *, stores: bool
) -> dict[str, Any]:
    """Seconds to the first token of each prompt, and tokens that were cached; one engine's life."""
    with LLM(**settings) as llm:
        llm.generate(input_ids=short, sampling_params=ONE)
        time.sleep(idle_s)
        seconds, cached, tokens = [], 0, []
        for prompt in prompts:
            began = time.perf_counter()
            output = llm.generate(input_ids=prompt, sampling_params=ONE)
            seconds.append(time.perf_counter() - began)
            assert output.usage is not None
            cached += output.usage.cached_tokens
            tokens.append(list(output.token_ids))
        began = time.perf_counter()
        while stores and int(llm.stats()["disk_pages"]) < int(llm.stats()["kv_pages_cached"]):
            assert time.perf_counter() - began < STORED_S
            time.sleep(0.1)
    return {"seconds": seconds, "cached_tokens": cached, "tokens": tokens}


def forget(folder: Path) -> None:
    """Have the system write the files of pages to the disk, and drop them from memory."""
    for path in folder.glob("pages/*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to the engine, for example --page-size 32.",
    )  # fmt: skip
    parser.add_argument("--prefix-len", type=int, default=4000, help="tokens of a prefix (4000)")
    parser.add_argument("--rounds", type=int, default=3, help="prefixes (3)")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds before the first, memory is made ready in (0)")
    options, settings = parse_with_engine_flags(parser)
    vocab = vocab_size_of(options.model_path)
    prompts = [prefill_prompt(vocab, number, options.prefix_len) for number in range(options.rounds)]
    short = prefill_prompt(vocab, 99, 100)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = settings | {"cache_dir": folder}
        results["plain"] = measure(settings, prompts, short, options.idle, stores=False)
        results["first"] = measure(kept, prompts, short, options.idle, stores=True)
        size = sum(path.stat().st_size for path in Path(folder).glob("pages/*"))
        results["warm"] = measure(kept, prompts, short, options.idle, stores=False)
        forget(Path(folder))
        results["disk"] = measure(kept, prompts, short, options.idle, stores=False)
    tokens = [result.pop("tokens") for result in results.values()]
    same = sum(one == other for one, other in zip(tokens[0], tokens[2], strict=True))
    plain = statistics.median(results["plain"]["seconds"])
    print(f"first token behind {options.prefix_len} tokens, {Path(options.model_path).name} {options.dtype}")
    for name, result in results.items():
        median = statistics.median(result["seconds"])
        result["plain_over_this"] = round(plain / median, 2)
        each = ", ".join(f"{seconds * 1e3:.0f}" for seconds in result["seconds"])
        print(f"  {name:<6} {median * 1e3:8.0f} ms  {plain / median:6.1f} times faster  ({each})")
    print(f"  {same} of {len(prompts)} first tokens are the same computed and loaded")
    figures = {"benchmark": "disk_cache", "model": Path(options.model_path).name, "dtype": options.dtype}
    print(json.dumps(figures | {"prefix_len": options.prefix_len, "bytes": size, "results": results}))


if __name__ == "__main__":
    main()
