"""Other engines that the offline benchmark can run beside ours: whether one is there, and how it is run.

Each runs in a process of its own, which reads a JSON job on stdin and writes one JSON line, its result, on stdout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("transformers", "vllm", "llama.cpp")
LLAMA_PROGRAMS = ("llama-bench", "llama-batched-bench")
STDERR_TAIL = 30  # lines of a failed peer's stderr that its error shows


class PeerError(ValueError):
    """A peer that is not there or that failed; the message says what to do or what it said last."""


class Peer(msgspec.Struct, frozen=True):
    """name, the command that runs a job there, and what the job needs beside the workload."""

    name: str
    command: list[str]
    job: dict[str, Any] = {}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The peer's result of one job. Raises PeerError with the end of its stderr where it fails."""
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            done = subprocess.run(
                self.command, input=json.dumps(job | self.job), stdout=subprocess.PIPE, stderr=stderr,
                text=True, check=False, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode != 0:
                stderr.seek(0)
                tail = "".join(stderr.readlines()[-STDERR_TAIL:])
                raise PeerError(f"{self.name} ended with exit code {done.returncode}; the last it said:\n{tail}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def names(text: str) -> list[str]:
    """`transformers,vllm` -> its parts, each a known peer. Raises PeerError."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PEERS:
            raise PeerError(f"--against {part!r}: must be one or more of {', '.join(PEERS)}, with commas between")
    if len(set(parts)) < len(parts):
        raise PeerError(f"--against {text!r}: names a peer twice")
    return parts


def find(name: str, *, vllm_python: str | None, llama_bin: str | None, gguf: str | None) -> Peer:
    """The peer, once it is known to be there. Raises PeerError, saying what is missing and how to give it."""
    match name:
        case "transformers":
            return _transformers()
        case "vllm":
            return _vllm(vllm_python)
        case "llama.cpp":
            return _llama(llama_bin, gguf)
    raise AssertionError(name)


def _transformers() -> Peer:
    if importlib.util.find_spec("transformers") is None:
        raise PeerError("transformers is not installed here: pip install 'transformers>=5'")
    return Peer(name="transformers", command=[sys.executable, "-m", "benchmarks.transformers_run"])


def _vllm(python: str | None) -> Peer:
    if python is None:
        raise PeerError("vllm: give the Python of its environment with --vllm-python PATH, or in VLLM_PYTHON")
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise PeerError(f"--vllm-python {python}: no such program")
    needs = "vllm", "msgspec", "psutil"
    code = f"import importlib.util as u; print(*[m for m in {needs} if u.find_spec(m) is None])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0 or done.stdout.strip():
        lacking = done.stdout.strip() or done.stderr.strip()
        raise PeerError(f"--vllm-python {python}: not vLLM's environment; it lacks {lacking}")
    return Peer(name="vllm", command=[python, "-m", "benchmarks.vllm_run"])


def _llama(folder: str | None, gguf: str | None) -> Peer:
    if folder is None:
        raise PeerError("llama.cpp: give the folder of its programs with --llama-bin DIR, or in LLAMA_BIN")
    for program in LLAMA_PROGRAMS:
        if not os.access(Path(folder) / program, os.X_OK):
            raise PeerError(f"--llama-bin {folder}: no {program} in it; build that target of llama.cpp")
    if gguf is None:
        raise PeerError("llama.cpp: give its model with --gguf FILE; benchmarks/make_gguf.sh makes one")
    if not Path(gguf).is_file():
        raise PeerError(f"--gguf {gguf}: no such file; benchmarks/make_gguf.sh makes one")
    job = {"llama_bin": str(Path(folder).resolve()), "gguf": str(Path(gguf).resolve())}
    return Peer(name="llama.cpp", command=[sys.executable, "-m", "benchmarks.llama_run"], job=job)
