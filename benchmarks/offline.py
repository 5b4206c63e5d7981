"""Throughput and latency of the engine on a fixed set of requests, optionally beside transformers in the same call.

    python benchmarks/offline.py --workload uniform16 --model-path ../shared/models/qwen3-0.6b --load-format dummy
    python benchmarks/offline.py --workload b1 --against transformers
    python benchmarks/offline.py --num-requests 64 --input-len 256 --output-len 64

Prints a table and, last, one JSON line. Machines are noisy: compare figures of one run only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/offline.py` finds the benchmarks package

from benchmarks.engine_run import run_engine  # noqa: E402
from benchmarks.machine import measure_in_subprocess  # noqa: E402
from benchmarks.report import print_report  # noqa: E402
from benchmarks.workloads import Workload, build  # noqa: E402

EMBEDDED = ROOT / "vibe_sgl_lite" / "models" / "tiny"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The benchmark's own options, and every other `--flag value` as an engine setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other --flag VALUE goes to the engine, for example --tp 2, --dtype float32 or --page-size 32.",
    )  # fmt: skip
    parser.add_argument("--workload", choices=("b1", "uniform16", "mixed16", "custom"), default=None)
    parser.add_argument("--num-requests", type=int, default=16, help="requests of a custom workload (16)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of each of them (128)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens each generates (128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random prompts (0)")
    parser.add_argument("--model-path", default=str(EMBEDDED), help="model folder (the embedded model)")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (bfloat16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-threads", type=int, default=None, help="threads a rank, and of transformers (all cores)")
    parser.add_argument("--against", choices=("transformers",), default=None, help="run the same work there too")
    parser.add_argument("--ceilings", action="store_true", help="measure the machine's read and GEMM rates too")
    options, rest = parser.parse_known_args(argv)
    return options, engine_flags(parser, rest)


def engine_flags(parser: argparse.ArgumentParser, rest: list[str]) -> dict[str, Any]:
    """`--page-size 32 --disable-radix-cache` -> {"page_size": 32, "disable_radix_cache": True}."""
    flags: dict[str, Any] = {}
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            parser.error(f"unexpected argument {name!r}")
        has_value = bool(rest) and not rest[0].startswith("--")
        text = rest.pop(0) if has_value else "true"
        try:
            flags[name[2:].replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            flags[name[2:].replace("-", "_")] = text
    return flags


def run_transformers(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    job = {
        "model_folder": options.model_path,
        "load_format": options.load_format,
        "dtype": options.dtype,
        "device": options.device,
        "num_threads": options.num_threads,
        "seed": options.seed,
        "workload": {"name": workload.name, "prompts": workload.prompts, "output_lens": workload.output_lens},
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.transformers_run"],
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    options, flags = parse()
    begin = time.perf_counter()

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            print(f"[{time.perf_counter() - begin:6.1f} s] {what}", file=sys.stderr, flush=True)

    options.model_path = str(Path(options.model_path).resolve())
    vocab_size = json.loads((Path(options.model_path) / "config.json").read_text())["vocab_size"]
    workload = build(
        options.workload or "custom", vocab_size=vocab_size, num_requests=options.num_requests,
        input_len=options.input_len, output_len=options.output_len, seed=options.seed,
    )  # fmt: skip
    result: dict[str, Any] = {
        "model": Path(options.model_path).name, "dtype": options.dtype, "device": options.device,
        "workload": workload.name, "num_requests": len(workload.prompts),
        "input_tokens": workload.input_tokens, "output_tokens": workload.output_tokens,
    }  # fmt: skip
    if options.ceilings:
        progress("measuring the machine")
        result["machine"] = measure_in_subprocess()
    progress("starting the engine")
    flags |= {"model_path": options.model_path, "load_format": options.load_format, "dtype": options.dtype}
    flags |= {"device": options.device, "num_threads": options.num_threads}
    result |= run_engine(workload, vocab_size, flags, progress)
    if options.against:
        progress("transformers runs")
        result["against_name"] = options.against
        result["against"] = run_transformers(options, workload)
    print_report(result)


if __name__ == "__main__":
    main()
