"""Building and caching the kernels: reuse, rebuild, concurrent ranks, no compiler."""

import logging
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.integration.daemon import wait_until
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.build import BuildError, build
from vibe_sgl_lite.model_worker.cpu.openmp import parallel_function

FAKE_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
echo compiled >> "{log}"
while [ "$1" != -o ]; do shift; done
sleep 0.2
echo built > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compiler that notes each compilation in compilations.log and writes a text file as its result."""
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "fake-c++"
    path.write_text(FAKE_COMPILER.format(log=tmp_path / "compilations.log"))
    path.chmod(0o755)
    return str(path)


def compilations(tmp_path: Path) -> int:
    return len((tmp_path / "compilations.log").read_text().splitlines())


def test_compiles_once_into_a_private_folder(tmp_path: Path, compiler: str) -> None:
    cache = tmp_path / "deep" / "cache"
    first = build(cache, [compiler])
    assert build(cache, [compiler]) == first
    assert compilations(tmp_path) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert {p.name for p in cache.iterdir()} == {first.name, "lock"}


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, compiler: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="not a folder of this user"):
        build(tmp_path / "cache", [compiler])


def test_a_planted_file_is_replaced(tmp_path: Path, compiler: str) -> None:
    target = build(tmp_path / "cache", [compiler])
    target.chmod(0o777)
    target.write_text("planted")
    assert build(tmp_path / "cache", [compiler]).read_text() == "built\n"


def test_another_compiler_gets_another_file(tmp_path: Path, compiler: str) -> None:
    first = build(tmp_path / "cache", [compiler])
    Path(compiler).write_text(Path(compiler).read_text().replace("fake 1.0", "fake 2.0"))
    assert build(tmp_path / "cache", [compiler]) != first


def test_several_processes_compile_once(tmp_path: Path, compiler: str) -> None:
    script = (
        "import sys, pathlib; from vibe_sgl_lite.model_worker.cpu.build import build; "
        "print(build(pathlib.Path(sys.argv[1]), sys.argv[2:]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), compiler]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {rank.communicate(timeout=60)[0] for rank in ranks}
    assert all(rank.returncode == 0 for rank in ranks)
    assert len(outputs) == 1
    assert compilations(tmp_path) == 1


def test_a_killed_process_takes_its_compiler_along_and_leaves_nothing(tmp_path: Path, compiler: str) -> None:
    """All that the compiler has started: the driver that is waited for does the least of the work. A rank ignores what
    its launcher is told, and so does what it starts."""
    quick = Path(compiler).read_text()
    Path(compiler).write_text(quick.replace("sleep 0.2", f'echo half > "$2"; sh -c "sleep 333; : {tmp_path}"'))
    script = (
        "import signal, sys, pathlib; from vibe_sgl_lite.model_worker.cpu.build import build; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); build(pathlib.Path(sys.argv[1]), sys.argv[2:])"
    )
    cache = tmp_path / "cache"
    rank = subprocess.Popen([sys.executable, "-c", script, str(cache), compiler])

    def workers() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if f"sleep 333; : {tmp_path}" in (p.info["cmdline"] or ())]

    wait_until(workers, 60, "it compiles")
    rank.kill()
    rank.wait()
    wait_until(lambda: not workers(), 20, "it is gone")
    assert len([*cache.glob("cpu_kernels-*")]) == 1
    Path(compiler).write_text(quick)
    built = build(cache, [compiler])
    assert [*cache.glob("cpu_kernels-*")] == [built]


def test_without_a_compiler_there_are_no_kernels_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "cache", ["no-such-compiler"]) is None
    assert "no C++ compiler found (looked for $CXX, no-such-compiler)" in caplog.text


def test_a_failing_compiler_means_no_kernels(tmp_path: Path, compiler: str, caplog: pytest.LogCaptureFixture) -> None:
    script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such header" >&2\nexit 1\n'
    Path(compiler).write_text(script)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "cache", [compiler]) is None
    assert "no such header" in caplog.text


def test_a_file_that_cannot_be_loaded_means_no_kernels(
    tmp_path: Path, compiler: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "cache", [compiler]) is None
    assert "plain torch is used" in caplog.text


def test_a_file_in_place_of_the_folder_means_no_kernels(tmp_path: Path, compiler: str) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BuildError, match="cannot use the cache folder"):
        build(tmp_path / "cache", [compiler])


def test_torchs_openmp_pool_is_found_and_no_second_one_is_loaded() -> None:
    assert parallel_function() is not None
    assert load(threads=2) is not None
    torch.ones(8) @ torch.ones(8)
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    runtimes = {line.split()[-1] for line in mapped.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) <= 1
