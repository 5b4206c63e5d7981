"""The run directory: private, locked by name, and gone afterwards."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import MAX_IPC_PATH, check_address
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints
from vibe_sgl_lite.runtime.transport.rundir import RunDir, default_address


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has its own run directory, under a short path."""
    with tempfile.TemporaryDirectory(prefix="rd-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_default_address_needs_no_daemon(base: Path) -> None:
    assert default_address() == f"ipc://{base}/vibe-sgl-lite/default/api.sock"
    assert default_address("two") == f"ipc://{base}/vibe-sgl-lite/two/api.sock"
    assert list(base.iterdir()) == []


def test_without_xdg_the_temporary_folder_and_the_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_address().endswith(f"/vibe-sgl-lite-{os.getuid()}/default/api.sock")


def test_everything_is_private_and_removed(base: Path) -> None:
    with RunDir("a") as run:
        assert run.address == default_address("a")
        assert run.inner.parent == base / "vibe-sgl-lite" / "a"
        for folder in (base / "vibe-sgl-lite", run.inner.parent, run.inner):
            assert mode(folder) == 0o700
        assert mode(run.inner.parent / "lock") == 0o600
        (run.inner / "sched").touch()
        (run.inner.parent / "api.sock").touch()
    assert list((base / "vibe-sgl-lite").iterdir()) == []


def test_inner_folder_is_random() -> None:
    with RunDir("a") as first:
        pass
    with RunDir("a") as second:
        assert first.inner != second.inner


def test_an_open_folder_of_ours_is_closed_up(base: Path) -> None:
    (base / "vibe-sgl-lite").mkdir(mode=0o755)
    with RunDir("a"):
        assert mode(base / "vibe-sgl-lite") == 0o700


def test_a_link_or_file_in_place_of_the_run_directory_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "vibe-sgl-lite").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        RunDir("a")
    with pytest.raises(ConfigError, match="not a folder"):
        default_address("a")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(base: Path) -> None:
    (base / "vibe-sgl-lite").mkdir()
    os.chown(base / "vibe-sgl-lite", 12345, 12345)
    with pytest.raises(ConfigError, match="user 12345"):
        RunDir("a")
    with pytest.raises(ConfigError, match="user 12345"):
        default_address("a")


def test_same_name_twice_names_the_owner() -> None:
    with RunDir("a"), RunDir("b"), pytest.raises(ConfigError, match=rf"--name a is in use by process {os.getpid()}"):
        RunDir("a")


def test_a_killed_owner_leaves_nothing_in_the_way(base: Path) -> None:
    code = (
        "import sys, time; from vibe_sgl_lite.runtime.transport.rundir import RunDir; "
        "r = RunDir('a'); print('ok', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ok\n"
    folder = base / "vibe-sgl-lite" / "a"
    (folder / "api.sock").touch()
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"process {owner.pid}"):
        RunDir("a")
    assert time.monotonic() - start < 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(list(folder.iterdir())) == 3  # lock, socket, inner folder
    with RunDir("a") as run:
        assert sorted(p.name for p in folder.iterdir()) == sorted(["lock", run.inner.name])


def test_lock_is_not_inherited_by_children() -> None:
    run = RunDir("a")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run.close()
        with RunDir("a"):
            pass
    finally:
        child.kill()
        child.wait()


def test_own_ipc_address(base: Path) -> None:
    path = base / "own.sock"
    with RunDir("a", f"ipc://{path}") as run:
        assert run.address == f"ipc://{path}"
        with pytest.raises(ConfigError, match=rf"--address ipc://{path} is in use by process {os.getpid()}"):
            RunDir("b", f"ipc://{path}")
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    assert not path.exists()
    assert not path.with_name(path.name + ".lock").exists()


def test_own_ipc_address_never_removes_a_file(base: Path) -> None:
    path = base / "notes.txt"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        RunDir("a", f"ipc://{path}")
    assert path.read_text() == "precious"


def test_tcp_port_in_use_names_the_owner() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port} is in use by process {os.getpid()}"):
            RunDir("a", f"tcp://127.0.0.1:{port}")
    with RunDir("a", f"tcp://127.0.0.1:{port}") as run:
        assert run.address == f"tcp://127.0.0.1:{port}"


@pytest.mark.parametrize("address", ["ipc:///tmp/x.sock", "tcp://127.0.0.1:0", "tcp://127.0.0.1:5555"])
def test_good_addresses(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("tcp://0.0.0.0:5555", "beyond loopback"),
        ("tcp://10.1.2.3:5555", "beyond loopback"),
        ("tcp://*:5555", "IPv4"),
        ("tcp://localhost:5555", "IPv4"),
        ("tcp://127.0.0.1:99999", "must be ipc"),
        ("tcp://127.0.0.1", "must be ipc"),
        ("http://127.0.0.1:80", "must be ipc"),
        ("ipc://", "file path"),
        ("ipc://@abstract", "file path"),
        ("ipc:///tmp/" + "x" * 100, "at most 103"),
    ],
)
def test_bad_addresses(address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        check_address(address)
    assert error.value.field == "address"
    assert address in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-x", "x" * 41, "é"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        default_address(name)


def test_paths_stay_short_whatever_the_environment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = base / ("d" * 80)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with RunDir("n" * 40) as run:
        endpoints = Endpoints(directory=str(run.inner), api=run.address)
        for address in (run.address, endpoints.control, endpoints.tokenizer_manager, endpoints.rank(1023)):
            assert len(address.removeprefix("ipc://")) <= MAX_IPC_PATH
        assert run.address == default_address("n" * 40)
