"""The folder in which compiled kernels are kept from one start to the next, those of CPUs and those of GPUs.

What lies in it is loaded into the process: the folder is private to the user (0700, owner checked), a file counts only
when nobody else can have written it, and a file appears only once it is whole, because several ranks start at a time.
"""

import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vibe_sgl_lite.runtime.settings.folders import cache_folders

log = logging.getLogger(__name__)


class CacheError(OSError):
    """A folder is not private to this user, or there is none at all; the message says why."""


def default_cache_dir() -> Path:
    """The first of `cache_folders()` that can be made private to this user; a warning says why others cannot.

    Raises CacheError when none can.
    """
    problems = []
    for folder in cache_folders():
        try:
            make_private(folder)
        except OSError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; the cache folder is %s", "; ".join(problems), folder)
        return folder
    raise CacheError(f"there is no cache folder: {'; '.join(problems)}")


def make_private(folder: Path) -> None:
    """Make it if it is missing, and close it to others. Raises CacheError if it is another user's or no folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise CacheError(f"the cache folder {folder} is not a folder of this user")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def is_ours(path: Path) -> bool:
    """Whether `path` is a regular file that this user alone can write; anything else there is to be replaced."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextmanager
def whole_file(path: Path, mode: int) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at once when the body ends; of one that fails nothing stays."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        yield unfinished
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; the operating system releases it also when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
