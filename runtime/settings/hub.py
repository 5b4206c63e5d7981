"""Models of the Hugging Face hub: downloaded into its cache, and told of while that takes long."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.folders import cache_folders

TIMEOUT_S = 5.0  # for the first answer of the hub; a missing network must be told within 10 s
TELL_EVERY_S = 5.0
TELL_FIRST_S = 2.0  # what is in the cache takes less

log = logging.getLogger(__name__)


def download(hub_id: str, revision: str | None, patterns: Sequence[str], flag: str) -> Path:
    """The folder in the hub's cache with the files that match, downloaded as far as they are not there.

    Raises ConfigError naming `flag` when the hub cannot be reached or lacks the model.
    """
    from huggingface_hub import constants, snapshot_download  # slow to import, rarely needed
    from huggingface_hub.utils.tqdm import disable_progress_bars

    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # a relative HF_HOME, or no home at all: it would land in the current folder
        cache = next(cache_folders()) / "hub"
        log.warning("the hub's cache %r is no absolute path; models are kept in %s", constants.HF_HUB_CACHE, cache)
    if sys.stderr.isatty():
        telling: contextlib.AbstractContextManager[None] = contextlib.nullcontext()  # the library's bars do
    else:
        disable_progress_bars()
        telling = _telling(hub_id, revision, patterns, cache)
    try:
        with telling:
            return Path(
                snapshot_download(
                    hub_id, revision=revision, cache_dir=cache, allow_patterns=[*patterns], etag_timeout=TIMEOUT_S
                )
            )
    except (OSError, ValueError) as error:  # every error of the hub library is one of the two
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{flag} {hub_id}: there is no such folder here, and the hub gave no model{offline}: {one_line(error)}",
            field=flag.removeprefix("--").replace("-", "_"),
        ) from error


@contextlib.contextmanager
def _telling(hub_id: str, revision: str | None, patterns: Sequence[str], cache: Path) -> Iterator[None]:
    """Every few seconds a line about a download that runs within: which files, and how many bytes of all."""
    done = threading.Event()
    arguments = (done, hub_id, revision, patterns, cache)
    threading.Thread(target=_tell, args=arguments, name="download", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _tell(done: threading.Event, hub_id: str, revision: str | None, patterns: Sequence[str], cache: Path) -> None:
    """By the sizes of the files in the cache, whatever fetches them: each is `blobs/HASH` when it is whole, and
    `blobs/HASH*.incomplete` before."""
    from huggingface_hub import HfApi

    if done.wait(TELL_FIRST_S):
        return
    try:
        listed = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S).siblings or []
    except (OSError, ValueError):
        return  # the download meets the same, and raises it
    sizes = {  # by hash
        file.lfs.sha256 if file.lfs else file.blob_id: (file.rfilename, file.size or 0)
        for file in listed
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)
    }
    blobs = cache / f"models--{hub_id.replace('/', '--')}" / "blobs"
    total = sum(size for _, size in sizes.values())
    start, before = time.monotonic(), None
    while True:
        present, running = 0, []
        for blob, (name, size) in sizes.items():
            if (blobs / str(blob)).exists():
                present += size
            elif parts := list(blobs.glob(f"{blob}*.incomplete")):
                present += max(map(_written, parts))
                running.append(name)
        before = present if before is None else before
        rate = (present - before) / max(time.monotonic() - start, 1e-9)
        if done.is_set():
            return
        log.warning(
            "downloading %s: %.1f of %.1f MB (%.0f %%), %.1f MB/s, now %s",
            hub_id, present / 1e6, total / 1e6, 100 * present / max(total, 1), rate / 1e6, ", ".join(running) or "-",
        )  # fmt: skip
        if done.wait(TELL_EVERY_S):
            return


def _written(file: Path) -> int:
    """Bytes of a file that grows, which may be made large at once and filled later; 0 when it has just been renamed."""
    try:
        found = file.stat()
    except OSError:
        return 0
    return min(found.st_size, found.st_blocks * 512)
