r"""How fast the ranks of one machine load a large sharded checkpoint, each its slices, beside what the disk reads.

    python benchmarks/internal/load_rate.py --folder /tmp/checkpoint --gb 20

Writes layers of a shape with some values into files of 2 GB, leaves nothing of them in memory, reads the files plainly
with 4 processes, forgets them again, and loads them with all ranks at once. Seconds and GB a
second of the files' bytes, of which every rank needs its part; then once more with the files in memory.
`--rounds N` does so N times, in turns with loads for which nothing is read ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/load_rate.py` finds the packages

from benchmarks.parallel_gpu import SHAPES  # noqa: E402
from vibe_sgl_lite.model_worker import read_ahead  # noqa: E402
from vibe_sgl_lite.model_worker.weights import load_weights  # noqa: E402
from vibe_sgl_lite.qwen3.checkpoint import load_items  # noqa: E402
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402

SHARD_BYTES = 2 << 30


def model_of(folder: Path, rank: int, ranks: int, device: torch.device) -> Qwen3:
    nobody: Any = object()  # loading meets nobody
    group = Group(rank, ranks, nobody if ranks > 1 else None)
    state = ParallelState(rank, tp=group, expert_tp=group)
    return Qwen3(ModelConfig.from_folder(folder), state, torch.bfloat16, device, TorchOperations())


def write(folder: Path, shape: dict[str, Any], size: float) -> int:
    """Bytes of the checkpoint, of values that follow each other in files of some GB."""
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    ends = 2 * shape["vocab_size"] * hidden
    layers = max(1, round((size * 5e8 - ends) / (hidden * (heads * dim + 3 * inner))))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
    shards = [dict[str, Any]()]
    end = total = 0
    for item in load_items(model_of(folder, 0, 1, torch.device("meta"))):
        for part in item.parts:
            count = 2 * torch.Size(part.shape).numel()
            if end and end + count > SHARD_BYTES:
                shards.append({})
                end = 0
            place = [end, end := end + count]
            shards[-1][part.name] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": place}
            total += count
    block = torch.randn(1 << 25).bfloat16().view(torch.uint8).numpy().data

    def fill(name: str, shard: dict[str, Any]) -> None:
        header = json.dumps(shard).encode()
        left = max(entry["data_offsets"][1] for entry in shard.values())
        with (folder / name).open("wb", buffering=0) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())

    names = [f"model-{number:05}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, names, shards))
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def forget(folder: Path) -> None:
    """Leave nothing of the files in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, ranks: int, device: str, ahead: bool) -> list[float]:
    """Seconds of each rank, all at once."""
    command = [sys.executable, __file__, "--folder", str(folder), "--ranks", str(ranks), "--device", device]
    command += [] if ahead else ["--without"]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], stdin=pipe, stdout=pipe, text=True) for rank in range(ranks)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    forget(folder)
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    again = [process.communicate()[0].splitlines() for process in started]
    return [float(line) for lines in again for line in lines]


def work(folder: Path, rank: int, ranks: int, device: str) -> None:
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    for first in (True, False):
        model = model_of(folder, rank, ranks, where)
        torch.zeros(1, device=where)
        if first:
            print("ready", flush=True)
            sys.stdin.readline()
        began = time.perf_counter()
        load_weights(model, folder)
        if device == "cuda":
            torch.cuda.synchronize(where)
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", default="32B")
    parser.add_argument("--gb", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.without:
        read_ahead.THREADS = 0
    if options.rank is not None:
        work(options.folder, options.rank, options.ranks, options.device)
        return
    began = time.perf_counter()
    size = write(options.folder, SHAPES[options.shape], options.gb)
    print(f"{size / 1e9:.1f} GB written in {time.perf_counter() - began:.1f} s", flush=True)
    for number in range(max(1, options.rounds)):
        read_plainly(options.folder, size)
        for ahead in (True,) if not options.rounds else (True, False) if number % 2 else (False, True):
            seconds = load(options.folder, options.ranks, options.device, ahead)
            for what, times in (("from disk", seconds[::2]), ("from memory", seconds[1::2])):
                print(
                    f"{options.ranks} ranks, {what}{'' if ahead else ', nothing read ahead'}: {max(times):.1f} s, "
                    f"{size / max(times) / 1e9:.2f} GB/s",
                    flush=True,
                )


def read_plainly(folder: Path, size: int) -> None:
    forget(folder)
    began = time.perf_counter()
    files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    subprocess.run(
        ["xargs", "-P", "4", "-n", "1", "cat"], input="\n".join(files), text=True, stdout=subprocess.DEVNULL, check=True
    )
    took = time.perf_counter() - began
    print(f"read plainly: {took:.1f} s, {size / took / 1e9:.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
