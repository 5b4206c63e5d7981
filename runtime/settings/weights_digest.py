"""What stands for a model's weights: whoever keeps what was computed with them keeps it under this.

SHA-256 of every byte of the files that are read. Samples would be cheaper and are not enough: a fine-tune may change a
single row of the embedding. It takes 0.7 s a GB, so it is remembered, under what the file system says of the files:
device, inode, size, and the times of the last changes of contents and of the inode. The latter nobody can set back.
Files changed less than RACY_S ago are not remembered: a change within the same tick of the clock would go unseen.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from vibe_sgl_lite.runtime.settings.safetensors_files import checkpoint_files

RACY_S = 2.0
PIECE = 8 << 20


def dummy_digest(seed: int) -> str:
    """Of weights made up with that seed (`--load-format dummy`); what else they depend on is the model's config."""
    return f"dummy {seed}"


def weights_digest(folder: Path, memo: Path | None = None, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Of the checkpoint in `folder`, 64 hex digits. memo: the folder in which it is remembered. None: `stopped`.

    Raises WeightsError, OSError.
    """
    files = checkpoint_files(folder)
    before = [os.stat(path) for path in files]
    identity = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in before]
    known = None if memo is None else memo / hashlib.sha256(repr(identity).encode()).hexdigest()
    if known is not None:
        with contextlib.suppress(OSError):
            text = known.read_text()
            if len(text) == 64:
                return text
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.stat(path).st_size.to_bytes(8, "little"))
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                if stopped():
                    return None
    if known is not None and max(s.st_ctime_ns for s in before) < time.time_ns() - RACY_S * 1e9:
        new = known.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk: it is computed again
            new.write_text(digest.hexdigest())
            new.replace(known)
    return digest.hexdigest()
