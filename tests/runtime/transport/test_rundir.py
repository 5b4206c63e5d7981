"""The run directory: private, locked by name, and gone afterwards."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import MAX_IPC_PATH, check_address
from vibe_sgl_lite.runtime.transport import rundir
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


@pytest.mark.parametrize("value", ["relative/run", ".", "/proc/no-such-folder", "/dev/null", "a blank", "file"])
@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_the_next_place_where_the_first_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "a blank").mkdir()
    if value in ("file", "a blank"):
        value = str(tmp_path / value)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setenv(variable, value)
    before = sorted(tmp_path.rglob("*"))
    name = f"t{secrets.token_hex(6)}"
    with RunDir(name) as run:
        assert run.address == f"ipc:///tmp/vibe-sgl-lite-{os.getuid()}/{name}/api.sock" == default_address(name)
        assert len(caplog.messages) == 1
        assert value in caplog.text
        assert f"the run directory is /tmp/vibe-sgl-lite-{os.getuid()}" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before, "nothing lands in the current folder"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_runtime_dir_of_another_user_is_not_used(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As su and sudo keep it, also for root, who could write there."""
    os.chown(base, 12345, 12345)
    name = f"t{secrets.token_hex(6)}"
    with RunDir(name) as run:
        assert run.address == default_address(name) == f"ipc:///tmp/vibe-sgl-lite-0/{name}/api.sock"
    assert "belongs to user 12345" in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("inside", ["", "deeper", "deeper/still"])
@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_somebody_who_may_not_look_into_it_goes_elsewhere(base: Path, variable: str, inside: str) -> None:
    """As su keeps root's environment: no bare PermissionError, for a client and for a daemon."""
    base.chmod(0o700)
    (base / "deeper").mkdir()
    name = f"t{secrets.token_hex(6)}"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            for other in ("XDG_RUNTIME_DIR", "TMPDIR"):
                os.environ.pop(other, None)
            os.environ[variable] = str(base / inside)
            with RunDir(name) as run:
                Path(run.address.removeprefix("ipc://")).touch()  # as a daemon's socket would be
                code = 0 if run.address == default_address(name) and str(base) not in run.address else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_client_finds_a_daemon_that_had_to_go_elsewhere(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"t{secrets.token_hex(6)}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/no-such-folder")
    with RunDir(name) as run:
        Path(run.address.removeprefix("ipc://")).touch()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        assert default_address(name) == run.address


def test_no_place_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, **rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ConfigError, match=r"no run directory: .*No space left on device.*set XDG_RUNTIME_DIR") as error:
        RunDir("a")
    assert "\n" not in str(error.value)


def test_a_full_disk_while_the_lock_is_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        RunDir("a")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with RunDir("a"):
        pass


def test_a_lock_that_is_a_link_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "vibe-sgl-lite" / "a").mkdir(parents=True)
    (base / "vibe-sgl-lite" / "a" / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="lock is a link"):
        RunDir("a")
    (base / "x.sock.lock").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="lock is a link"):
        RunDir("b", f"ipc://{base}/x.sock")
    assert not (tmp_path / "other").exists()


def test_a_run_directory_that_is_removed_meanwhile(base: Path) -> None:
    with RunDir("a"):
        shutil.rmtree(base / "vibe-sgl-lite")
    with RunDir("a", f"ipc://{base}/own.sock"):
        shutil.rmtree(base)
    base.mkdir()


def test_folders_of_killed_daemons_are_swept(base: Path, tmp_path: Path) -> None:
    run = base / "vibe-sgl-lite"
    for name in ("dead", "empty", "no-lock"):
        (run / name).mkdir(parents=True)
    (run / "dead" / "lock").write_text("1")
    (run / "dead" / "0123").mkdir()
    (run / "dead" / "0123" / "spec.json").touch()
    (run / "dead" / "api.sock").touch()
    (run / "no-lock" / "notes").touch()
    (tmp_path / "lock").touch()
    (run / "link").symlink_to(tmp_path)
    (run / "a-file").touch()
    with RunDir("alive"), RunDir("a"):
        assert sorted(path.name for path in run.iterdir()) == ["a", "a-file", "alive", "link", "no-lock"]
        assert (run / "alive" / "lock").read_text() == str(os.getpid())
    assert (tmp_path / "lock").exists()


def test_who_is_swept_while_it_starts_waits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "OWNER_PID_WAIT_S", 60.0)
    folder = base / "vibe-sgl-lite" / "a"
    folder.mkdir(parents=True)
    swept, empty = threading.Event(), rundir._empty

    def slow(path: Path) -> None:
        if path == folder and threading.current_thread() is sweeper:
            swept.set()
            time.sleep(0.2)
        empty(path)

    monkeypatch.setattr(rundir, "_empty", slow)
    (folder / "lock").write_text("1")  # a killed owner's
    sweeper = threading.Thread(target=lambda: RunDir("b").close())
    sweeper.start()
    assert swept.wait(30)
    with RunDir("a"):
        sweeper.join()
        assert (folder / "lock").read_text() == str(os.getpid())


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


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="nobody cleans up here")
def test_what_cleans_tmp_up_keeps_the_files_of_a_daemon_that_lives(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removed the lock and the spec file, after ten days: what started again afterwards waited for them."""
    settings = tmp_path / "settings.conf"
    settings.write_text(f"d {base} 0777 - - 1s\n")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(base))
    with RunDir("kept") as run:
        assert str(base) in run.address
        (run.inner / "spec.json").touch()
        (base / "old").touch()
        before = sorted(Path(run.inner).parent.rglob("*"))
        time.sleep(1.5)
        subprocess.run(["systemd-tmpfiles", "--clean", str(settings)], check=True)
        assert not (base / "old").exists()
        assert sorted(Path(run.inner).parent.rglob("*")) == before
    assert not [path for path in base.rglob("*") if "kept" in str(path)]


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
    assert time.monotonic() - start < 10
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
