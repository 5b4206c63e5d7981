"""Where a model's files come from: the embedded model, a folder, or the Hugging Face hub.

Knows nothing of what is in the files (runtime/settings/model_config.py reads them).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.folders import cache_folders

EMBEDDED = "embedded"
EMBEDDED_FOLDER = ("models", "tiny")  # in the package vibe_sgl_lite
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = ("*.json", "*.jinja", "*.txt")  # configs, tokenizer, chat templates
WEIGHT_FILES = ("*.safetensors",)
HUB_TIMEOUT_S = 5.0  # for the first answer of the hub; a missing network must be told within 10 s

log = logging.getLogger(__name__)


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
        folder = _download(model_path, revision, weights, flag)
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


def _download(hub_id: str, revision: str | None, weights: bool, flag: str) -> Path:
    from huggingface_hub import constants, snapshot_download  # slow to import, rarely needed
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # a relative HF_HOME, or no home at all: it would land in the current folder
        cache = next(cache_folders()) / "hub"
        log.warning("the hub's cache %r is no absolute path; models are kept in %s", constants.HF_HUB_CACHE, cache)
    patterns = [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, cache_dir=cache, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub library is one of the two
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{flag} {hub_id}: there is no such folder here, and the hub gave no model{offline}: {one_line(error)}",
            field=flag.removeprefix("--").replace("-", "_"),
        ) from error
