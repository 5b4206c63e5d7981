"""Where a model's files come from: the embedded model, a folder, or the Hugging Face hub.

Knows nothing of what is in the files (runtime/settings/model_config.py reads them).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.logs import one_line

EMBEDDED = "embedded"
EMBEDDED_FOLDER = ("models", "tiny")  # in the package vibe_sgl_lite
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = ("*.json", "*.jinja", "*.txt")  # configs, tokenizer, chat template
WEIGHT_FILES = ("*.safetensors",)
HUB_TIMEOUT_S = 5.0  # for the first answer of the hub; a missing network must be told within 10 s


class ModelSource(msgspec.Struct, frozen=True):
    """folder: local, absolute. name: what clients see."""

    folder: Path
    name: str


def find_model(model_path: str, *, weights: bool, flag: str = "--model-path") -> ModelSource:
    """The local folder of `model_path`, downloaded first when it is a hub id. `weights`: whether they are needed.

    Raises ConfigError naming `flag` when there is no such folder, and when the hub cannot be reached or lacks it.
    """
    if model_path == EMBEDDED:
        folder = embedded_folder()
        return ModelSource(folder, folder.name)
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return ModelSource(folder, folder.name)
    if HUB_ID.fullmatch(model_path) and not folder.exists():
        return ModelSource(_download(model_path, weights, flag), model_path)
    problem = "is a file, not a folder" if folder.exists() else "does not exist"
    raise ConfigError(
        f"{flag} {model_path} {problem}: give a folder, a hub id like Qwen/Qwen3-0.6B, or '{EMBEDDED}'",
        field=flag.removeprefix("--").replace("-", "_"),
    )


def embedded_folder() -> Path:
    """The model inside the package, found without importing it. Raises ConfigError when the installation lacks it."""
    package = importlib.util.find_spec("vibe_sgl_lite")
    for root in (package.submodule_search_locations or ()) if package else ():
        folder = Path(root).joinpath(*EMBEDDED_FOLDER)
        if folder.is_dir():
            return folder
    raise ConfigError(
        "the embedded model is missing from this installation: install the package anew, or pass --model-path",
        field="model_path",
    )


def _download(hub_id: str, weights: bool, flag: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
    except (OSError, ValueError) as error:  # every error of the hub library is one of the two
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{flag} {hub_id}: there is no such folder here, and the hub gave no model{offline}: {one_line(error)}",
            field=flag.removeprefix("--").replace("-", "_"),
        ) from error
