"""How long streams stand still for new weights: pause (keep), update from disk, continue, beside running streams.

    python benchmarks/internal/weight_update.py --model-path ../shared/models/qwen3-0.6b --updates 5

Two checkpoints of the model's shape, of random numbers, are written to a temporary folder first; the page cache has
them then, as it has what a trainer has just written. Prints each update's parts, and the rates at which this machine
copies the files out of the page cache and reads memory: an update has to do both at least once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import measure_in_subprocess  # noqa: E402
from benchmarks.options import parse_with_engine_flags  # noqa: E402
from vibe_sgl_lite import LLM, ClosedError, SamplingParams  # noqa: E402
from vibe_sgl_lite.runtime.settings.checkpoint import tensor_shapes  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402

BLOCK = 1 << 22  # random numbers that repeat


def write_checkpoint(source: Path, folder: Path, seed: int) -> int:
    """bfloat16, as published. Returns its bytes."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    block = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * 0.02
    pattern = (block.view(np.uint32) >> 16).astype(np.uint16)
    header, at = {}, 0
    shapes = tensor_shapes(ModelConfig.from_folder(source))
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            left, first = int(np.prod(shape)), number * 7919 % BLOCK
            while left:
                part = pattern[first : first + left]
                file.write(part.tobytes())
                left, first = left - len(part), 0
    return at


def read_rate(file: Path) -> float:
    """GB/s of one thread, out of the page cache."""
    buffer, done = bytearray(1 << 24), 0
    began = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            done += count
    return done / (time.perf_counter() - began) / 1e9


def cpu_seconds() -> float:
    """Of the engine's processes so far: on a busy machine, the better measure."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(spent.user + spent.system for spent in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4)
    options, settings = parse_with_engine_flags(parser)
    print(json.dumps(measure_in_subprocess()))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [Path(folder) / name for name in ("a", "b")]
        for seed, path in enumerate(checkpoints):
            size = write_checkpoint(Path(options.model_path), path, seed)
        rate = max(read_rate(checkpoints[0] / "model.safetensors") for _ in range(3))
        print(f"{size / 1e9:.2f} GB a checkpoint; out of the page cache {rate:.1f} GB/s, {size / 1e9 / rate:.2f} s")
        settings |= {"model_path": str(checkpoints[0]), "load_format": "auto", "log_level": "warning"}
        with LLM(**settings) as llm:
            tokens = [0] * options.streams

            def stream(number: int) -> None:
                params = SamplingParams(max_new_tokens=4000, temperature=0, ignore_eos=True)
                with contextlib.suppress(ClosedError):  # at the end
                    for chunk in llm.stream(input_ids=[number + 1] * 64, sampling_params=params):
                        tokens[number] += len(chunk.token_ids)

            for number in range(options.streams):
                threading.Thread(target=stream, args=(number,), daemon=True).start()
            totals = []
            for update in range(options.updates):
                before = sum(tokens)
                while sum(tokens) < before + 8 * options.streams:
                    time.sleep(0.01)
                marks = [time.perf_counter()]
                llm.pause_generation("keep")
                marks.append(time.perf_counter())
                spent = cpu_seconds()
                llm.update_weights_from_disk(checkpoints[(update + 1) % 2], str(update))
                spent = cpu_seconds() - spent
                marks.append(time.perf_counter())
                llm.continue_generation()
                marks.append(time.perf_counter())
                pause, load, back = (later - earlier for earlier, later in itertools.pairwise(marks))
                totals.append(marks[-1] - marks[0])
                parts = f"pause {pause:.3f} s, update {load:.3f} s ({spent:.2f} s of CPU time), continue {back:.3f} s"
                print(f"{parts}: {totals[-1]:.3f} s", flush=True)
            before = sum(tokens)
            while sum(tokens) < before + 8 * options.streams:
                time.sleep(0.01)
            print(f"median {statistics.median(totals):.3f} s, worst {max(totals):.3f} s; the streams go on")


if __name__ == "__main__":
    main()
