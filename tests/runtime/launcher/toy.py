"""A pipeline of stand-in processes (fake_child.py), and who of them lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

NAMES = ("model_worker.0", "tokenizer_manager", "scheduler", "detokenizer")


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


def children(**behaviours: str) -> list[ChildSpec]:
    """The engine's four with behaviours by name (rank 0 is `rank`)."""
    specs = []
    for name in NAMES:
        asked = behaviours.get("rank" if name == "model_worker.0" else name, "ready")
        specs.append(ChildSpec(name, "tests.runtime.launcher.fake_child", (name, *asked.split())))
    return specs


def pipeline(model: Path, args: ServerArgs | None = None, **behaviours: str) -> Pipeline:
    args = args or ServerArgs(model_path=str(model), log_level="error", restart="never")
    return Pipeline(args, children=children(**behaviours))


def processes() -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.Process().children():
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "tests.runtime.launcher.fake_child" in line:
            found[line[line.index("tests.runtime.launcher.fake_child") + 2]] = process
    return found


def told(model: Path) -> list[str]:
    file = model / "told"
    return file.read_text().splitlines() if file.exists() else []


def restarting(model: Path, max_restarts: int = 3, manager: str = "note", **behaviours: str) -> Pipeline:
    args = ServerArgs(model_path=str(model), log_level="error", restart="on-failure", max_restarts=max_restarts)
    return Pipeline(args, children=children(tokenizer_manager=manager, **behaviours))


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
