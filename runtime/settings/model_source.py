"""Where a model's files come from: the embedded model, a folder, or the Hugging Face hub.

Knows nothing of what is in the files (runtime/settings/model_config.py reads them).
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.hub import download

EMBEDDED = "embedded"
EMBEDDED_FOLDER = ("models", "tiny")  # in the package vibe_sgl_lite
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = ("*.json", "*.jinja", "*.txt")  # configs, tokenizer, chat templates
WEIGHT_FILES = ("*.safetensors",)


class ModelSource(msgspec.Struct, frozen=True):
    """folder: local, absolute. name: what clients see."""

    folder: Path
    name: str


def find_model(
    model_path: str, *, weights: bool, revision: str | None = None, flag: str = "--model-path"
) -> ModelSource:
    """The local folder of `model_path`, downloaded first when it is a hub id. `weights`: whether they are needed.

    revision: of a hub id, a branch, tag or commit; None: the newest.
    Raises ConfigError naming `flag` when there is no such folder, when a file in it is a link that leads out of it,
    and when the hub cannot be reached or lacks it.
    """
    is_id = HUB_ID.fullmatch(model_path) is not None and not os.path.lexists(model_path)
    if revision is not None and not is_id:
        raise ConfigError(f"--revision {revision} is for a hub id, and {flag} {model_path} is none", field="revision")
    if model_path == EMBEDDED:
        folder = embedded_folder()
        return ModelSource(folder, folder.name)
    field = flag.removeprefix("--").replace("-", "_")
    try:
        model_path.encode()
        folder = Path(model_path).expanduser()
        found, is_folder = folder.exists(), folder.is_dir()
        if is_folder:
            folder = folder.resolve()
            str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{flag} {model_path!r}: its path is not UTF-8, rename it", field=field) from error
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, no such user, a name that is too long
        raise ConfigError(f"{flag} {model_path} cannot be looked at: {one_line(error)}", field=field) from error
    if is_folder:
        _check_links(folder)
        return ModelSource(folder, folder.name)
    if is_id:
        folder = download(model_path, revision, (*TEXT_FILES, *(WEIGHT_FILES if weights else ())), flag)
        _check_links(folder)
        return ModelSource(folder, model_path)
    problem = "is a file, not a folder" if found else "does not exist"
    raise ConfigError(
        f"{flag} {model_path} {problem}: give a folder, a hub id like Qwen/Qwen3-0.6B, or '{EMBEDDED}'", field=field
    )


def _check_links(folder: Path) -> None:
    """Refuse links that leave the model folder; a hub cache's links into its own blobs are its layout."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent.resolve() / "blobs")
    for pattern in (*TEXT_FILES, *WEIGHT_FILES):
        for path in (*folder.glob(pattern), *folder.glob(f"*/{pattern}")):
            target = path.resolve()
            if not any(target.is_relative_to(root) for root in roots):
                raise ConfigError(
                    f"{path} leads out of the model folder, to {target}; put the file itself into {folder}",
                    field="model_path",
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
