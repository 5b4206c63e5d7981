"""Mutations of a model folder's JSON files: each is read right, or refused in one line.

    python -m tests.fuzz.model_files --cases 5000 --launches 20 --seed 0

Most cases run what the launcher and the tokenizer manager do with the files, in this process; where they are taken,
every tenth is loaded and its logits are compared with transformers'. `--launches` are whole starts of the daemon.
A case is (seed, number), so that one that fails is run again alone: `--first 1234 --cases 1`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.qwen3.harness import DENSE, PagedRun, Row, load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite import Client, SamplingParams
from vibe_sgl_lite.runtime.errors import ContextLengthError, UserError
from vibe_sgl_lite.runtime.launcher.spec import make_spec
from vibe_sgl_lite.runtime.settings.model_source import embedded_folder
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

ROOT = Path(__file__).resolve().parents[2]
SHAPE = DENSE | {"vocab_size": 2048, "max_position_embeddings": 4096, "tie_word_embeddings": True}
INDEX = "model.safetensors.index.json"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", INDEX)
START_S = 10.0  # in which a start must be over, or have begun to serve
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**400, 0.5, 1.0, -1.5, 1e-300, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "x", "0", "1e-6", "\ud800", "\0", "line\nbreak", "é" * 50, "a" * 10_000,
    "../config.json", "/etc/passwd", "float8_e4m3fn", "yarn", "Qwen2ForCausalLM", [], {}, [None], [1, 2], ["x"],
    [[]], {"a": 1}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 2}, {"content": 3},
)  # fmt: skip
Document = dict[str, Any]


def make_folder(folder: Path) -> None:
    """A model in two files with an index, small, with the embedded model's tokenizer."""
    make_checkpoint(folder, SHAPE, max_shard_size="600KB")
    assert (folder / INDEX).is_file()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder() / name, folder / name)


def mutate(random: random.Random, folder: Path) -> str:
    """Change one of the files a little, or a little more; returns what was done."""
    name = random.choice(FILES)
    path = folder / name
    if random.random() < 0.15:
        return f"{name}: {_mutate_bytes(random, path)}"
    document = json.loads(path.read_text())
    done = [_mutate_value(random, document) for _ in range(random.choice((1, 1, 1, 2, 4)))]
    path.write_text(json.dumps(document))
    return f"{name}: {'; '.join(done)}"


def _mutate_bytes(random: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    kind = random.choice(("cut", "flip", "insert", "empty", "deep", "repeat", "not an object"))
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        data[place] ^= 1 << random.randrange(8)
    elif kind == "insert":
        data[place:place] = random.randbytes(random.choice((1, 2, 40)))
    elif kind == "empty":
        data.clear()
    elif kind == "deep":
        data[:] = b'{"a":' * 100_000
    elif kind == "repeat":
        data += bytes(data)
    else:
        data[:] = random.choice((b"[]", b"3", b'"x"', b"null", b"NaN"))
    path.write_bytes(data)
    return f"{kind} at {place}"


def _mutate_value(random: random.Random, document: Document) -> str:
    holder: Any = document
    key: Any = random.choice(list(document)) if document else "x"
    while holder and isinstance(holder.get(key) if isinstance(holder, dict) else holder[key], dict | list):
        inner = holder[key]
        if not inner or random.random() < 0.3:
            break
        holder, key = inner, random.choice(list(inner)) if isinstance(inner, dict) else random.randrange(len(inner))
    kind = random.choice(("replace", "replace", "replace", "delete", "rename", "scale", "new key", "another's"))
    old = holder.get(key) if isinstance(holder, dict) else holder[key]
    if kind == "delete":
        holder.pop(key) if isinstance(holder, list) or key in holder else None
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}{random.choice(('_', 's', ' '))}"] = holder.pop(key, None)
    elif kind == "scale" and isinstance(old, int | float):
        holder[key] = old * random.choice((2, 3, -1, 1000, 0))
    elif kind == "new key" and isinstance(holder, dict):
        holder[
            random.choice(("quantization_config", "rope_scaling", "auto_map", "num_beams", "é", "rope_parameters"))
        ] = random.choice(ODD)
    elif kind == "another's":
        holder[key] = copy.deepcopy(random.choice(list(document.values()))) if document else 3
    else:
        holder[key] = copy.deepcopy(random.choice(ODD))
    return f"{kind} {str(key)[:60]!r}"


class Wrong(Exception):
    """A case that neither was right nor refused as it should be."""


def try_in_process(folder: Path, *, compare: bool) -> str | None:
    """What refused it, in one line; None where it was taken. Raises Wrong."""
    started = time.monotonic()
    try:
        spec = make_spec(ServerArgs(model_path=str(folder)), Endpoints(directory="/tmp/x", api="ipc:///tmp/x/api"))
        tokenizer = ChatTokenizer.from_folder(spec.tokenizer_folder)
        assert spec.model.vocab_size == SHAPE["vocab_size"], "no weights have another shape"
        if tokenizer.vocab_size <= spec.model.vocab_size:
            ids = tokenizer.encode("Once upon a time")
            assert all(0 <= token < tokenizer.vocab_size for token in ids), ids
        if compare:
            compare_logits(folder)
    except UserError as error:
        if "\n" in str(error) or not str(error) or len(str(error)) > 2000:
            raise Wrong(f"not one line: {str(error)[:3000]!r}") from error
        return str(error)
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    finally:
        if time.monotonic() - started > START_S:
            raise Wrong(f"it took {time.monotonic() - started:.1f} s")
    return None


def compare_logits(folder: Path) -> None:
    """Raises Wrong where transformers reads `folder` as another model; what it refuses, it cannot be asked about."""
    tokens = random_tokens(12, vocab=2000)
    ours = PagedRun(load_model(folder)).step([(Row(tokens), 12)])
    try:
        reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = reference_logits(reference, tokens)
    except Exception:  # noqa: BLE001 - whatever a file makes the library raise
        return
    if not torch.allclose(ours, theirs, atol=2e-3, rtol=2e-3, equal_nan=True):
        raise Wrong(f"logits differ from transformers' by {(ours - theirs).abs().max():.3g}")


def try_launch(folder: Path, base: Path, limit_s: float = START_S) -> str | None:
    """As `try_in_process`, with a real daemon, a request, and a look at what is left."""
    flags = (
        *("--model-path", str(folder), "--log-level", "error", "--num-threads", "1", "--max-total-tokens", "2048"),
        *("--port", "0"),  # daemons of one machine must not share one
        "--no-standby",  # a spare rank reads nothing of the folder
    )
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"XDG_RUNTIME_DIR": str(base)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        ready = process.stdout.readline().decode()
        took = time.monotonic() - started
        served = ""
        if ready:
            try:
                with Client(ready.split()[1]) as client:
                    output = client.generate("Once upon a time", SamplingParams(max_new_tokens=4))
                    served = str(output.finish_reason)
            except Exception as error:  # noqa: BLE001 - it is what the case is about
                served = f"{type(error).__name__}: {error}"
            process.terminate()
        stderr = process.communicate()[1].decode(errors="replace")
    left = [path for path in base.rglob("*") if path.name not in ("vibe-sgl-lite",)]
    if left or "Traceback" in stderr or took > limit_s:
        raise Wrong(f"exit {process.returncode} after {took:.1f} s, left {left}, stderr {stderr[-1500:]}")
    if ready:
        too_short = served.startswith(ContextLengthError.__name__)  # as the files say
        if process.returncode != 0 or not (served in ("stop", "length") or too_short):
            raise Wrong(f"exit {process.returncode}, the request: {served}, stderr {stderr[-1500:]}")
        return None
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if process.returncode != 2 or len(errors) != 1:
        raise Wrong(f"exit {process.returncode}, stderr {stderr[-1500:]}")
    return errors[0]


def run(seed: int, numbers: range, check: Callable[[Path, int], str | None]) -> Iterator[tuple[int, str, str | None]]:
    """(number, what was done, who refused it) of every case; Wrong stops it and names the case."""
    with tempfile.TemporaryDirectory(prefix="fz-", dir="/tmp") as base:
        origin = Path(base) / "origin"
        make_folder(origin)
        for number in numbers:
            folder = Path(base) / f"case-{number}"
            shutil.copytree(origin, folder, copy_function=os.link)
            for name in FILES:  # these are changed, the others only linked
                (folder / name).unlink()
                shutil.copy(origin / name, folder / name)
            done = mutate(random.Random(f"{seed}-{number}"), folder)
            try:
                yield number, done, check(folder, number)
            except Wrong as wrong:
                wrong.add_note(f"seed {seed}, number {number}: {done}")
                raise
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--launches", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-going", action="store_true", help="print what is wrong, and go on")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    wrong = 0

    def check(folder: Path, number: int) -> str | None:
        nonlocal wrong
        try:
            return try_in_process(folder, compare=number % 10 == 0)
        except Wrong as error:
            if not options.keep_going:
                raise
            wrong += 1
            sys.stdout.write(f"WRONG {number}: {str(error)[:300]}\n")
            return "wrong"

    def launch(folder: Path, number: int) -> str | None:
        with tempfile.TemporaryDirectory(prefix="fl-", dir="/tmp") as base:
            return try_launch(folder, Path(base))

    numbers = range(options.first, options.first + options.cases)
    for words, cases, how in (
        ("cases in this process", numbers, check),
        ("whole starts", range(options.first, options.first + options.launches), launch),
    ):
        counts = Counter("taken" if refused is None else "refused" for _, _, refused in run(options.seed, cases, how))
        sys.stdout.write(f"{len(cases)} {words}: {dict(counts)}, {wrong} wrong\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
