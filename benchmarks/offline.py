r"""Throughput and latency of the engine on a fixed set of requests, optionally beside other engines in the same call.

    python benchmarks/offline.py --workload uniform16 --model-path ../shared/models/qwen3-0.6b --load-format dummy
    python benchmarks/offline.py --workload b1 --against transformers --rounds 3 --ceilings
    python benchmarks/offline.py --workload b1 --against vllm,llama.cpp --vllm-python ENV/bin/python \
        --llama-bin llama.cpp/build/bin --gguf qwen3-0.6b-bf16.gguf
    python benchmarks/offline.py --num-requests 64 --input-len 256 --output-len 64

Prints a table and, last, one JSON line. Machines are noisy: compare figures of one run only. docs/benchmarks.md tells
what is measured and how to install the other engines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/offline.py` finds the benchmarks package

from benchmarks.engine_run import run_engine  # noqa: E402
from benchmarks.machine import measure_in_subprocess, physical_cores  # noqa: E402
from benchmarks.peers import Peer, PeerError, find, names  # noqa: E402
from benchmarks.report import combine, print_report, ratios  # noqa: E402
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
    parser.add_argument("--against", default=None, help="run there too: transformers, vllm, llama.cpp; commas between")
    parser.add_argument("--vllm-python", default=os.environ.get("VLLM_PYTHON"), help="Python with vLLM (VLLM_PYTHON)")
    parser.add_argument("--llama-bin", default=os.environ.get("LLAMA_BIN"), help="llama.cpp's programs (LLAMA_BIN)")
    parser.add_argument("--gguf", default=None, help="the model file that llama.cpp runs")
    parser.add_argument("--rounds", type=int, default=1, help="how often engines take turns; medians are reported (1)")
    parser.add_argument("--ceilings", action="store_true", help="measure the machine's rates, before and after")
    options, rest = parser.parse_known_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    try:
        options.peers = find_peers(options)
    except PeerError as error:
        parser.error(str(error))
    return options, engine_flags(parser, rest)


def find_peers(options: argparse.Namespace) -> list[Peer]:
    """Those that --against names, each known to be there before anything runs. Raises PeerError."""
    given = {"vllm_python": options.vllm_python, "llama_bin": options.llama_bin, "gguf": options.gguf}
    peers = [find(name, **given) for name in names(options.against)] if options.against else []
    for peer in peers:
        if options.device != "cpu" and peer.name != "transformers":
            raise PeerError(f"--against {peer.name}: runs on --device cpu only")
    return peers


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


def peer_job(options: argparse.Namespace, workload: Workload, vocab_size: int) -> dict[str, Any]:
    """What every peer is told; it takes of it what it needs."""
    return {
        "model_folder": options.model_path,
        "load_format": options.load_format,
        "dtype": options.dtype,
        "device": options.device,
        "num_threads": options.num_threads,
        "cores": physical_cores()[: options.num_threads],
        "seed": options.seed,
        "vocab_size": vocab_size,
        "workload": {"name": workload.name, "prompts": workload.prompts, "output_lens": workload.output_lens},
    }


def main() -> None:
    options, settings = parse()
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
        "settings": settings, "workload": workload.name, "num_requests": len(workload.prompts),
        "input_tokens": workload.input_tokens, "output_tokens": workload.output_tokens, "rounds": options.rounds,
    }  # fmt: skip
    if options.ceilings:
        progress("measuring the machine")
        result["machine"] = {"before": measure_in_subprocess()}
    flags = settings | {"model_path": options.model_path, "load_format": options.load_format, "dtype": options.dtype}
    flags |= {"device": options.device, "num_threads": options.num_threads}
    job = peer_job(options, workload, vocab_size)
    ours: list[dict[str, Any]] = []
    theirs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in options.peers}
    for number in range(options.rounds):
        progress(f"round {number + 1} of {options.rounds}: starting the engine")
        ours.append(run_engine(workload, vocab_size, flags, progress))
        for peer in options.peers:
            progress(f"{peer.name} runs")
            try:
                theirs[peer.name].append(peer.run(job))
            except PeerError as error:
                sys.exit(f"error: {error}")
    if options.ceilings:
        progress("measuring the machine again")
        result["machine"]["after"] = measure_in_subprocess()
    result |= combine(ours)
    result["peers"] = {name: combine(rounds) for name, rounds in theirs.items()}
    result["ratios"] = {name: ratios(result, peer) for name, peer in result["peers"].items()}
    if len(options.peers) == 1:
        result["against_name"] = options.peers[0].name
        result["against"] = result["peers"][options.peers[0].name]
    print_report(result)


if __name__ == "__main__":
    main()
