"""Memory and cores as a container has them, on trees of files as the kernel lays them out, and on this machine."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vibe_sgl_lite.runtime.settings.machine import available_memory, has_gpu, total_memory, trim_memory, usable_cores

MIB = 1 << 20
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
V2_MOUNTS = "31 23 0:28 {top} /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n"


def tree(root: Path, mounts: str, groups: str, files: dict[str, str], top: str = "/") -> Path:
    """A file system with /proc/self/{cgroup,mountinfo} and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts.format(top=top))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1_STAT = "inactive_file 1\nactive_file 1\ntotal_inactive_file 10485760\ntotal_active_file 5242880\n"
V2_STAT = "anon 1\nfile 77\ninactive_file 10485760\nactive_file 5242880\n"


def test_v1_limit_of_a_group_and_of_those_above(tmp_path: Path) -> None:
    files = {
        "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/a/b/memory.usage_in_bytes": f"{40 * MIB}\n",
        "memory/a/memory.limit_in_bytes": f"{200 * MIB}\n",
        "memory/a/memory.usage_in_bytes": f"{115 * MIB}\n",
        "memory/a/memory.stat": V1_STAT,
        "memory/memory.limit_in_bytes": f"{1000 * MIB}\n",
        "memory/memory.usage_in_bytes": "0\n",
    }
    found = available_memory(tree(tmp_path, V1_MOUNTS, "4:memory:/a/b\n1:cpu,cpuacct:/a\n", files))
    assert found.value == (200 - 115 + 15) * MIB
    assert "memory/a, limit 200 MiB" in found.source
    assert total_memory(tmp_path) == 200 * MIB


def test_v2_limit_and_high(tmp_path: Path) -> None:
    files = {
        "app/memory.max": "max\n",
        "app/memory.high": f"{100 * MIB}\n",
        "app/memory.current": f"{30 * MIB}\n",
        "app/memory.stat": V2_STAT,
        "memory.max": f"{300 * MIB}\n",
        "memory.current": "0\n",
    }
    found = available_memory(tree(tmp_path, V2_MOUNTS, "0::/app\n", files))
    assert found.value == (100 - 30 + 15) * MIB
    assert "app, limit 100 MiB" in found.source
    assert total_memory(tmp_path) == 100 * MIB


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/x", "/../other", "/"])
def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path, path: str) -> None:
    """Docker without a cgroup namespace mounts /docker/abc; with one, paths may lead out of what is mounted."""
    files = {"memory/memory.limit_in_bytes": f"{64 * MIB}\n", "memory/memory.usage_in_bytes": "0\n"}
    found = available_memory(tree(tmp_path, V1_MOUNTS, f"4:memory:{path}\n", files, top="/docker/abc"))
    assert found.value == 64 * MIB


def test_more_in_use_than_allowed(tmp_path: Path) -> None:
    files = {"memory.max": f"{10 * MIB}", "memory.current": f"{11 * MIB}"}
    assert available_memory(tree(tmp_path, V2_MOUNTS, "0::/\n", files)).value == 0


@pytest.mark.parametrize("groups", ["", "0::/\n", "4:memory:/gone\n0::/gone\n"])
def test_without_limits_the_machine_decides(tmp_path: Path, groups: str) -> None:
    found = available_memory(tree(tmp_path, V1_MOUNTS + V2_MOUNTS, groups, {"memory.max": "max"}))
    assert found.source == "the machine"
    assert total_memory(tmp_path) == psutil.virtual_memory().total
    assert abs(found.value - psutil.virtual_memory().available) < 512 * MIB
    assert usable_cores(tmp_path).value == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "cores"),
    [
        (V2_MOUNTS, "0::/app\n", {"app/cpu.max": "150000 100000\n"}, 1),
        (V2_MOUNTS, "0::/app\n", {"app/cpu.max": "50000 100000\n"}, 1),
        (V2_MOUNTS, "0::/app/x\n", {"app/cpu.max": "300000 100000\n", "app/x/cpu.max": "max 100000\n"}, 3),
        (V1_MOUNTS, "1:cpu,cpuacct:/a\n",
         {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 2),
        (V1_MOUNTS, "1:cpu,cpuacct:/a\n",
         {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, groups: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(tree(tmp_path, mounts, groups, files)).value == cores


def test_ulimit() -> None:
    code = "from vibe_sgl_lite.runtime.settings.machine import available_memory as a; print(a())"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 2000000; exec "$@"', "sh", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "ulimit -v 2000000" in done.stdout, done.stderr
    assert 0 < float(done.stdout.split("value=")[1].split(",")[0]) < 2000000 << 10


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 300 MiB, where this machine lets tests make one."""
    for base, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = base / f"test-{secrets.token_hex(4)}"
        try:
            group.mkdir()
            (group / file).write_text(str(300 * MIB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group can be made here; the trees of files above are what is tested then")


def test_in_a_real_group(memory_group: Path) -> None:
    code = "from vibe_sgl_lite.runtime.settings.machine import available_memory as a; print(a().value / 2**20)"
    joined = ["sh", "-c", f'echo $$ > {memory_group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", code]
    free = float(subprocess.run(joined, capture_output=True, text=True, check=True).stdout)
    assert 150 < free < 300


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, True), ("0", True), ("1,0", True), ("GPU-ac578e61", True), ("", False), (" ", False), ("-1", False)],
)
def test_a_hidden_gpu_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: bool
) -> None:
    """So that an engine goes to the CPU where its user hides the cards from it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert not has_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert has_gpu(tmp_path) == expected


def test_what_was_freed_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [bytes(2048) for _ in range(40_000)]
    pinned = blocks[-1]  # at the end of the heap, so that it cannot shrink by itself
    blocks.clear()
    before = process.memory_info().rss
    trim_memory()
    assert before - process.memory_info().rss > 40 * MIB
    assert len(pinned) == 2048
