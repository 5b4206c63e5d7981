"""Memory and cores that this process may use: of the machine, less what its control groups (v1 and v2) forbid.

A container's limits are those of its group and of every group above it, so all are read, and the tightest counts. See
cgroup(7) and the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

# Of a group's memory, what the kernel takes back before it kills: files' pages that have been read.
RECLAIMABLE = ("total_inactive_file", "total_active_file", "inactive_file", "active_file")
V1_MEMORY, V1_CPU = "memory", "cpu"
MOST_DESCRIPTORS = 65_536


class Limit(msgspec.Struct, frozen=True):
    """An amount and who sets it, in words for a log line."""

    value: float
    source: str


def available_memory(root: Path = Path("/")) -> Limit:
    """Bytes that could still be taken without swapping or being killed. root: of the file system, for tests."""
    limits = [Limit(psutil.virtual_memory().available, "the machine")]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        free = max(0, most - psutil.Process().memory_info().vms)
        limits.append(Limit(free, f"ulimit -v {most >> 10}"))
    for group in _groups(root, V1_MEMORY):
        limit = _memory_limit(group)
        used = _number(group / "memory.usage_in_bytes") or _number(group / "memory.current")
        if limit is not None:
            free = limit - max(0, (used or 0) - _reclaimable(group))
            limits.append(Limit(max(0, free), f"control group {group}, limit {limit / 2**20:.0f} MiB"))
    return min(limits, key=lambda limit: limit.value)


def total_memory(root: Path = Path("/")) -> int:
    """Bytes that there are for this process and what shares its control groups, free or not."""
    limits = [_memory_limit(group) for group in _groups(root, V1_MEMORY)]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def trim_memory() -> None:
    """Let the system have what this process has freed: of its start, 50 MB where a large vocabulary was read."""
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores(root: Path = Path("/")) -> Limit:
    """Whole cores that this process may keep busy, at least 1: its affinity (a cpuset is part of it) and CPU quotas."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    limits = [Limit(len(affinity), "the cores that this process may run on")]
    for group in _groups(root, V1_CPU):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and all(word.isdigit() for word in words):
            quota, period = int(words[0]), int(words[1])
        if quota and period:
            limits.append(Limit(max(1, quota // period), f"control group {group}, quota {quota / period:g} cores"))
    return min(limits, key=lambda limit: limit.value)


def _memory_limit(group: Path) -> int | None:
    limit = _number(group / "memory.limit_in_bytes") or _number(group / "memory.max")
    return min((value for value in (limit, _number(group / "memory.high")) if value is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that this process is in and that `controller` may limit: of v1's tree and of v2's."""
    mounts = list(_mounts(root, controller))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for version_2, top, point in mounts:
            if version_2 == bool(controllers):
                continue
            # The part of the tree that is mounted; inside a container often the group itself is, or one beside it.
            inside = os.path.relpath(path, top) if path == top or path.startswith(top.rstrip("/") + "/") else "."
            folder = point / inside
            while True:
                if folder.is_dir():
                    yield folder
                if folder == point:
                    break
                folder = folder.parent


def _mounts(root: Path, controller: str) -> Iterator[tuple[bool, str, Path]]:
    """(whether of version 2, the group that is mounted, where), from /proc/self/mountinfo; see proc(5)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and controller in kind[2].split(",")):
            yield kind[0] == "cgroup2", _unescape(fields[3]), root / _unescape(fields[4]).lstrip("/")


def _unescape(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _reclaimable(group: Path) -> int:
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines() if line.count(" ") == 1)
    names = [name for name in RECLAIMABLE if name in stat]
    totals = [name for name in names if name.startswith("total_")] or names  # v1 has its own and those of all below
    return sum(int(stat[name]) for name in totals)


def _number(path: Path) -> int | None:
    """A file's number; None where there is none, or it means "no limit"."""
    text = _read(path).strip()
    if not text.isdigit():  # "max" in v2, "-1" in v1
        return None
    value = int(text)
    return value if value < 2**60 else None  # v1's "no limit" is the largest number of whole pages


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def raise_descriptor_limit() -> int:
    """To what the system allows this process, within reason. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = (MOST_DESCRIPTORS if value == resource.RLIM_INFINITY else value for value in (soft, hard))
    wanted = min(most, MOST_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has one of NVIDIA's, which CUDA_VISIBLE_DEVICES does not hide; torch may or may not be built
    for it. root: of the file system, for tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return False  # CUDA takes no device behind one that there is not
    return any((root / "dev" / node).exists() for node in ("nvidia0", "nvidiactl", "dxg"))
