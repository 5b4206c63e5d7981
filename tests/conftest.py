"""For the whole suite: tests of stand-in processes and daemons must not meet a user's own; and where there is no GPU,
kernels for one run in Triton's interpreter, which is chosen before anything imports Triton (torch does, at times).

Threads of OpenMP sleep while they wait, in the engines of tests too: tests run in a process for each core (Makefile),
and waiting in a loop, as is usual, takes the core from those that work. Such tests took four times as long."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported


@pytest.fixture(scope="session", autouse=True)
def private_run_directory() -> Iterator[Path]:
    """All run directories of the suite under one short path of its own, removed at the end."""
    folder = tempfile.mkdtemp(prefix="vt-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)
    shutil.rmtree(folder)
