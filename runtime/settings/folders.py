"""Where caches lie: the user's cache folder, wherever that is, and never the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

NAME = "vibe-sgl-lite"


def home() -> Path | None:
    """The user's home; None where there is none: no HOME and a uid that nobody knows, as in many containers."""
    try:
        folder = Path.home()
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


def cache_folders() -> Iterator[Path]:
    """Where this project's cache may be, the best first: $XDG_CACHE_HOME, the home's cache folder, temporary folders.

    A relative $XDG_CACHE_HOME does not count, as its specification has it. None of them is made or looked at here.
    """
    bases = [Path(os.environ.get("XDG_CACHE_HOME", ""))]
    if (own := home()) is not None:
        bases.append(own / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    yield from (base / NAME for base in bases if base.is_absolute())
    for base in (Path(os.environ.get("TMPDIR", "")), Path("/tmp"), Path("/var/tmp")):
        if base.is_absolute():
            yield base / f"{NAME}-cache-{os.getuid()}"
