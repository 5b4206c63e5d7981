"""What an engine holds of the machine, counted before and after: what has grown was leaked."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.integration.daemon import Daemon
from vibe_sgl_lite import Client

MEMORY_GROWTH = 1.05
MEMORY_SLACK = 8 << 20  # bytes: an allocator's own steps
RANK_SLACK = 64 << 20  # of a rank, whose KV pool is committed as it is used
RANK_THREADS = 2  # of a rank's own: those that commit memory ahead and compute masks begin when they are first needed


@dataclass(frozen=True)
class Holdings:
    """processes: by name. files: of the run directory; numbers in their names (of an epoch) do not count. descriptors,
    threads, memory (bytes, of its own): of each process."""

    processes: Counter[str]
    files: Counter[str]
    descriptors: dict[str, int]
    threads: dict[str, int]
    memory: dict[str, int]


def holdings(daemon: Daemon) -> Holdings:
    """Of a daemon that is idle."""
    children = {name: child for name, child in daemon.children().items() if not name.startswith("standby")}
    found = {"launcher": psutil.Process(daemon.process.pid), **children}
    folder = Path(daemon.address.removeprefix("ipc://")).parent
    files = [path.name for path in folder.rglob("*") if path.is_socket() or path.is_file()]
    return Holdings(
        Counter(name.split(".")[0] for name in found),
        Counter(re.sub(r"\d+", "#", name) for name in files),
        {name: process.num_fds() for name, process in found.items()},
        {name: process.num_threads() for name, process in found.items()},
        {name: process.memory_full_info().uss for name, process in found.items()},
    )


def growth(before: Holdings, after: Holdings) -> list[str]:
    """What is more than before, in words."""
    grown = [
        f"{name}: {count} {what}, {old.get(name, 0)} before"
        for what, old, new in (
            ("processes", before.processes, after.processes),
            ("files", before.files, after.files),
            ("descriptors", before.descriptors, after.descriptors),
            ("threads", before.threads, after.threads),
        )
        for name, count in new.items()
        if count > old.get(name, 0) + (RANK_THREADS if what == "threads" and name.startswith("model_worker") else 0)
    ]
    return grown + [
        f"{name}: {size >> 20} MiB, {before.memory[name] >> 20} before"
        for name, size in after.memory.items()
        if size
        > before.memory[name] * MEMORY_GROWTH + (RANK_SLACK if name.startswith("model_worker") else MEMORY_SLACK)
    ]


def assert_idle(client: Client) -> None:
    """Within 30 s no request is anywhere, and all pages are free or cached."""
    deadline = time.monotonic() + 30
    while not _is_idle(stats := client.stats()):
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)


def _is_idle(stats: Mapping[str, object]) -> bool:
    busy = any(stats[name] for name in ("num_running", "num_waiting", "requests_in_flight"))
    return not busy and int(str(stats["kv_pages_free"])) + int(str(stats["kv_pages_cached"])) == stats["kv_pages_total"]
