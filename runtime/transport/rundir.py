"""The private run directory: where a daemon's sockets live, who holds them, and what is removed at the end.

    <run>/                          0700, ours: $XDG_RUNTIME_DIR/vibe-sgl-lite, else <tmp>/vibe-sgl-lite-<uid>
    <run>/<name>/lock               flock held by the launcher for its whole life; holds its pid
    <run>/<name>/api.sock           where clients connect
    <run>/<name>/<random>/          the pipeline's inner sockets and its spec file

The lock is taken before any socket exists, because ZeroMQ silently takes an ipc path away from whoever has it bound.
Knows nothing of processes and messages.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import MAX_IPC_PATH, check_address, check_name, split_tcp

INNER_BYTES = 4  # randomness of the inner folder's name, which is a lock-protected 0700 folder's child
LONGEST_INNER_NAME = "rank999.9999"  # of runtime/transport/endpoints.py
LOCK_FILE = "lock"
OWNER_PID_WAIT_S = 1.0  # how long a holder of the lock may take to write its pid


def default_address(name: str = "default") -> str:
    """Where the daemon called `name` listens when it was given no --address; what a client connects to.

    Raises ConfigError for an impossible name, and when the run directory exists but belongs to somebody else.
    """
    folder = _name_folder(name)
    if folder.parent.exists():
        _check_owner(folder.parent)
    return f"ipc://{folder / 'api.sock'}"


class RunDir:
    """One daemon's hold on its name and its address. `address` is where the API is to be bound; `inner` is private.

    Raises ConfigError naming the owner's pid when the name, the ipc path or the TCP port is in use, and for an address
    that is not allowed. `close` removes everything that was made here.
    """

    def __init__(self, name: str, address: str | None = None) -> None:
        self._locks: list[_Lock] = []
        self._folder = _name_folder(name)
        self.address = ""
        try:
            self._lock_folder(name)
            self._remove_leftovers()
            self.address = default_address(name) if address is None else self._own_address(address)
            self.inner = self._folder / secrets.token_hex(INNER_BYTES)
            self.inner.mkdir(mode=0o700)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove sockets, locks and folders. Safe to call twice."""
        if not self._locks:
            return
        if self.address.startswith("ipc://"):
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)
        self._remove_leftovers()
        for lock in reversed(self._locks):
            lock.release()
        self._locks.clear()
        with contextlib.suppress(OSError):  # the next daemon of this name may have taken the folder already
            self._folder.rmdir()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _lock_folder(self, name: str) -> None:
        while not self._locks:
            _make_private(self._folder.parent)
            _make_private(self._folder)
            with contextlib.suppress(FileNotFoundError):  # the last owner removed the folder just now
                self._locks.append(_Lock(self._folder / LOCK_FILE, f"--name {name}"))

    def _remove_leftovers(self) -> None:
        """What this daemon made, or what one of the same name that was killed had left."""
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink(missing_ok=True)

    def _own_address(self, address: str) -> str:
        check_address(address)
        if address.startswith("ipc://"):
            path = Path(os.path.abspath(address.removeprefix("ipc://")))
            if not path.parent.is_dir():
                raise ConfigError(f"--address {address}: the folder {path.parent} does not exist", field="address")
            self._locks.append(_Lock(path.with_name(path.name + ".lock"), f"--address {address}"))
            if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"--address {address}: there is a file that is no socket", field="address")
            path.unlink(missing_ok=True)
            return f"ipc://{path}"
        host, port = split_tcp(address)
        _check_port_free(host, port, address)
        return address


def _check_port_free(host: str, port: int, address: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            owner = _listener_pid(port)
            raise ConfigError(
                f"--address {address} is in use by {'another process' if owner is None else f'process {owner}'}: "
                f"stop it or choose another port ({error.strerror})",
                field="address",
            ) from error


def _listener_pid(port: int) -> int | None:
    """The process that listens on `port`; None when it is another user's, whose sockets we may not see."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return connection.pid
    except psutil.Error:
        pass  # macOS shows other processes' sockets to root alone
    return None


def _name_folder(name: str) -> Path:
    """`<run>/<name>`, in the first base folder that leaves every socket path short enough."""
    check_name(name)
    uid = os.getuid()
    bases = [Path(tempfile.gettempdir()) / f"vibe-sgl-lite-{uid}", Path("/tmp") / f"vibe-sgl-lite-{uid}"]
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    if xdg:
        bases.insert(0, Path(xdg) / "vibe-sgl-lite")
    for base in bases:
        longest = base / name / ("0" * 2 * INNER_BYTES) / LONGEST_INNER_NAME
        if base.is_absolute() and len(os.fsencode(longest)) <= MAX_IPC_PATH:
            return base / name
    raise AssertionError(f"no folder is short enough for the sockets of {name!r}")  # /tmp always is


def _make_private(folder: Path) -> None:
    """Make `folder` 0700, or check that the one there is ours and make it so."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        _check_owner(folder)
        folder.chmod(0o700)


def _check_owner(folder: Path) -> None:
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{folder} is not a folder, but the run directory must be one: remove it", field="name")
    if info.st_uid != os.getuid():
        raise ConfigError(
            f"{folder} belongs to user {info.st_uid}, not to you ({os.getuid()}): it cannot be trusted; "
            "set XDG_RUNTIME_DIR to a folder of your own",
            field="name",
        )


class _Lock:
    """An flock on a file that holds the owner's pid. The kernel drops it when the owner dies, however it dies."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self._owner()
                os.close(self._fd)
                raise ConfigError(
                    f"{what} is in use by process {owner}: stop it or choose another", field="name"
                ) from error
            if self._still_there():
                break
            os.close(self._fd)  # its owner removed the file between our open and our flock
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _still_there(self) -> bool:
        try:
            on_disk = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(on_disk, os.fstat(self._fd))

    def _owner(self) -> str:
        deadline = time.monotonic() + OWNER_PID_WAIT_S
        while True:
            pid = os.pread(self._fd, 32, 0).decode(errors="replace")
            if pid or time.monotonic() > deadline:
                return pid or "unknown"
            time.sleep(0.02)
