"""For the whole suite: tests of stand-in processes and daemons must not meet a user's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def private_run_directory() -> Iterator[Path]:
    """All run directories of the suite under one short path of its own, removed at the end."""
    folder = tempfile.mkdtemp(prefix="vt-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)
    shutil.rmtree(folder)
