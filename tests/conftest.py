"""For the whole suite: tests of stand-in processes and daemons must not meet a user's own; and where there is no GPU,
kernels for one run in Triton's interpreter, which is chosen before anything imports Triton (torch does, at times)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def private_run_directory() -> Iterator[Path]:
    """All run directories of the suite under one short path of its own, removed at the end."""
    folder = tempfile.mkdtemp(prefix="vt-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)
    shutil.rmtree(folder)
