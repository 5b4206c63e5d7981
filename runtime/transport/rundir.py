"""The private run directory: where a daemon's sockets live, who holds them, and what is removed at the end.

    <run>/                          0700, ours: $XDG_RUNTIME_DIR/vibe-sgl-lite, else vibe-sgl-lite-<uid> in $TMPDIR,
                                    /tmp or /var/tmp, the first that can be used
    <run>/<name>/lock               flock held by the launcher for its whole life; holds its pid
    <run>/<name>/api.sock           where clients connect
    <run>/<name>/<random>/          the pipeline's inner sockets and its spec file

The lock is taken before any socket exists, because ZeroMQ silently takes an ipc path away from whoever has it bound.
Knows nothing of processes and messages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

import psutil

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import MAX_IPC_PATH, check_address, check_name, split_tcp
from vibe_sgl_lite.runtime.transport.listeners import who_listens

INNER_BYTES = 4  # randomness of the inner folder's name, which is a lock-protected 0700 folder's child
LONGEST_INNER_NAME = "rank999.9999"  # of runtime/transport/endpoints.py
LOCK_FILE = "lock"
API_SOCKET = "api.sock"
OWNER_PID_WAIT_S = 5.0  # how long a holder of the lock may take to write its pid, or to sweep

log = logging.getLogger(__name__)


def default_address(name: str = "default") -> str:
    """Where the daemon called `name` listens when it was given no --address; what a client connects to.

    Where there are several run directories, for they may have changed since it started, the one that has it counts.
    Raises ConfigError for an impossible name, and when the run directory belongs to somebody else.
    """
    check_name(name)
    bases, _ = _bases(name)
    found = next((base for base in bases if os.path.lexists(base / name / API_SOCKET)), bases[0])
    if os.path.lexists(found):
        _check_owner(found)
    return f"ipc://{found / name / API_SOCKET}"


def engine_lives(address: str) -> bool | None:
    """Whether the launcher of the engine at `address` is there, by the pid in its lock; None: nothing tells (TCP)."""
    if not address.startswith("ipc://"):
        return None
    path = Path(address.removeprefix("ipc://"))
    for lock in (path.with_name(LOCK_FILE), path.with_name(path.name + ".lock")):
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            return psutil.Process(int(lock.read_text())).status() != psutil.STATUS_ZOMBIE
    return False


class RunDir:
    """One daemon's hold on its name and its address. `address` is where the API is to be bound; `inner` is private.

    What killed daemons of other names have left beside it is removed first.
    Raises ConfigError naming the owner's pid when the name, the ipc path or the TCP port is in use, for an address that
    is not allowed, and when no folder can be used. `close` removes everything that was made here.
    """

    def __init__(self, name: str, address: str | None = None, *, encrypted: bool = False) -> None:
        """encrypted: it may lie beyond loopback."""
        self._encrypted = encrypted
        self._locks: list[_Lock] = []
        self._kept = -1
        self._name = name
        self.address = ""
        check_name(name)
        bases, problems = _bases(name)
        for base in bases:
            try:
                self._take(base)
                break
            except OSError as error:  # not one of ours: a ConfigError
                problems.append(f"{base} cannot be used ({error.strerror})")
                self.close()
            except BaseException:
                self.close()
                raise
        else:
            raise ConfigError(f"no run directory: {'; '.join(problems)}; set XDG_RUNTIME_DIR to a folder of your own",
                              field="name")  # fmt: skip
        if problems:
            log.warning("%s; the run directory is %s", "; ".join(problems), self._folder.parent)
        try:
            _sweep(self._folder.parent)
            self.address = f"ipc://{self._folder / API_SOCKET}" if address is None else self._own_address(address)
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
        self.address = ""
        if self._kept >= 0:
            os.close(self._kept)
            self._kept = -1
        with contextlib.suppress(OSError):  # the next daemon of this name may have taken the folder already
            self._folder.rmdir()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _take(self, base: Path) -> None:
        """Lock `base`/<name> and make what is private to this start. Raises OSError when `base` cannot be used."""
        self._folder = base / self._name
        while not self._locks:
            _make_private(base)
            _make_private(self._folder)
            with contextlib.suppress(FileNotFoundError):  # the last owner removed the folder just now
                self._locks.append(_Lock(self._folder / LOCK_FILE, f"--name {self._name}"))
                self._keep_from_cleaners()
        self._remove_leftovers()
        self.inner = self._folder / secrets.token_hex(INNER_BYTES)
        self.inner.mkdir(mode=0o700)

    def _keep_from_cleaners(self) -> None:
        """systemd-tmpfiles removes what is old in /tmp, but nothing in a folder that somebody has locked."""
        self._kept = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # not every file system has locks on folders
            fcntl.flock(self._kept, fcntl.LOCK_SH)

    def _remove_leftovers(self) -> None:
        """What this daemon made, or what one of the same name that was killed had left."""
        _empty(self._folder)

    def _own_address(self, address: str) -> str:
        check_address(address, encrypted=self._encrypted)
        if address.startswith("ipc://"):
            path = Path(os.path.abspath(address.removeprefix("ipc://")))
            if not path.parent.is_dir():
                raise ConfigError(f"--address {address}: the folder {path.parent} does not exist", field="address")
            try:
                self._locks.append(_Lock(path.with_name(path.name + ".lock"), f"--address {address}"))
            except OSError as error:
                raise ConfigError(
                    f"--address {address}: {path.parent} cannot be used: {error.strerror}", field="address"
                ) from error
            if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
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
            raise ConfigError(
                f"--address {address} is in use by {who_listens(port)}: "
                f"stop it or choose another port ({error.strerror})",
                field="address",
            ) from error


def _bases(name: str) -> tuple[list[Path], list[str]]:
    """Where run directories may be, the best first; and why others that were asked for are not among them.

    Never the current folder: what an environment variable names must be an absolute path. All leave sockets' paths
    short enough.
    """
    uid = os.getuid()
    bases: list[Path] = []
    problems: list[str] = []
    for variable, ending in (("XDG_RUNTIME_DIR", "vibe-sgl-lite"), ("TMPDIR", f"vibe-sgl-lite-{uid}")):
        text = os.environ.get(variable)
        if text:
            problem = _problem(Path(text), name, ending, own=variable == "XDG_RUNTIME_DIR")
            if problem is None:
                bases.append(Path(text) / ending)
            else:
                problems.append(f"{variable}={text!r} {problem}")
    bases += [Path(folder) / f"vibe-sgl-lite-{uid}" for folder in ("/tmp", "/var/tmp")]
    return list(dict.fromkeys(bases)), problems


def _problem(folder: Path, name: str, ending: str, *, own: bool) -> str | None:
    """Why no run directory is made in `folder`; None if it can be. own: whether it must be ours (su keeps others')."""
    longest = folder / ending / name / ("0" * 2 * INNER_BYTES) / LONGEST_INNER_NAME
    text = str(folder)
    if not folder.is_absolute():
        return "is no absolute path"
    if not text.isprintable() or " " in text:
        return "has a blank or an odd character in it"
    if len(os.fsencode(longest)) > MAX_IPC_PATH:
        return "is too long for sockets' paths"
    try:
        info = folder.stat()
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(info.st_mode):
        return "is not a folder"
    if own and info.st_uid != os.getuid():
        return f"belongs to user {info.st_uid}, not to you ({os.getuid()})"
    return None


def _sweep(base: Path) -> None:
    """Remove the folders of daemons that were killed: those whose lock nobody holds."""
    for folder in base.iterdir():
        try:
            if folder.is_symlink() or not folder.is_dir():
                continue
            if not (folder / LOCK_FILE).exists():
                folder.rmdir()  # only an empty one, and who has just made it makes it again
                continue
            lock = _Lock(folder / LOCK_FILE, "", sweep=True)
        except (OSError, ConfigError):
            continue
        _empty(folder)
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()


def _empty(folder: Path) -> None:
    """Remove all but the lock. That `folder` itself is gone is fine: others clean up too (logind, at logout)."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink(missing_ok=True)


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

    def __init__(self, path: Path, what: str, *, sweep: bool = False) -> None:
        """Raises ConfigError when it is held, naming `what` and the owner. sweep: it is taken for a moment, to clean
        up; so no pid is written, and who wants it meanwhile waits for it."""
        self._path = path
        deadline, seen = time.monotonic() + OWNER_PID_WAIT_S, ""
        while True:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise ConfigError(f"{path} is a link, but a lock must be a file: remove it", field="name") from error
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                pid = os.pread(self._fd, 32, 0).decode(errors="replace")
                os.close(self._fd)
                if sweep or (pid and pid == seen) or time.monotonic() > deadline:  # at first it may be a dead owner's
                    raise ConfigError(
                        f"{what} is in use by process {pid or 'unknown'}: stop it or choose another", field="name"
                    ) from error
                seen = pid
                time.sleep(0.02)
                continue
            if self._still_there():
                break
            os.close(self._fd)  # its owner removed the file between our open and our flock
        try:
            os.ftruncate(self._fd, 0)
            if not sweep:
                os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        except OSError:  # the disk is full
            self.release()
            raise

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _still_there(self) -> bool:
        try:
            on_disk = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(on_disk, os.fstat(self._fd))
