"""The folder of `--cache-dir`: KV pages as files, which outlive the engine that wrote them.

    <folder>/lock                    flock held by the launcher for its whole life; holds its pid
    <folder>/pages/<key>.<r>-<n>     what rank r of n has of a page; key: 64 hex digits (scheduler/tiers/disk.py)
    <folder>/new.<r>.<random>/       files that rank r is writing; renamed into pages/ when they are whole
    <folder>/digests/                of weights (runtime/settings/weights_digest.py)

What is in it tells of prompts: files are 0600 in folders of 0700.

A file is a header and the page's bytes. The header has the key, the rank and a CRC-32 of all the rest, so a file that
is cut, damaged or under another's name is none. Files are never written again, only made, read and removed. They are
not flushed to the disk: one that a power failure took the data of fails its check.

A rank begins with a `new` folder of its own and removes those of its predecessors: what a dead rank's last thread may
still write has no place to go. A page counts when all its ranks have it. One engine uses a folder at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vibe_sgl_lite.runtime.errors import ConfigError

KEY_BYTES = 32
BLOCK = 4096  # what file systems round up to
_HEADER = struct.Struct("<8sQ32sIII")  # magic, bytes of the page, key, rank, ranks; last the CRC of these and the page
_CRC = struct.Struct("<I")
_MAGIC = b"VSLPAGE1"
_NAME = re.compile(r"([0-9a-f]{64})\.(\d{1,4})-(\d{1,4})")
READ_BYTES = 1 << 18  # at a time: the check finds them in the core's cache
_SCAN_STEP = 1000  # files between two heartbeats


class PageFile(NamedTuple):
    """A page of which all ranks' files are there. size: of all of them, in whole blocks."""

    key: bytes
    size: int
    ranks: int


def pages_folder(folder: Path) -> Path:
    return folder / "pages"


def file_name(key: bytes, rank: int, ranks: int) -> str:
    return f"{key.hex()}.{rank}-{ranks}"


def file_bytes(page_bytes: int) -> int:
    """What the file of so many bytes of a page takes."""
    return -(-(_HEADER.size + page_bytes) // BLOCK) * BLOCK


def pack_header(key: bytes, rank: int, ranks: int, page: memoryview) -> bytes:
    front = _front(len(page), key, rank, ranks)
    return front + _CRC.pack(zlib.crc32(page, zlib.crc32(front)))


def _front(size: int, key: bytes, rank: int, ranks: int) -> bytes:
    """The header of a page of so many bytes without its last field."""
    return _HEADER.pack(_MAGIC, size, key, rank, ranks, 0)[: -_CRC.size]


def read_page(path: Path, key: bytes, rank: int, ranks: int, page: memoryview) -> bool:
    """Fill `page` from the file; False if it is not there, not whole or not what its name says."""
    front = _front(len(page), key, rank, ranks)
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(_HEADER.size)
            if os.fstat(file.fileno()).st_size != _HEADER.size + len(page) or len(header) != _HEADER.size:
                return False
            at, crc = 0, zlib.crc32(front)
            while at < len(page):
                count = file.readinto(page[at : at + READ_BYTES])
                if not count:
                    return False
                crc = zlib.crc32(page[at : at + count], crc)
                at += count
    except OSError:
        return False
    return header == front + _CRC.pack(crc)


def write_page(new: Path, target: Path, header: bytes, page: memoryview) -> None:
    """Make the file, whole or not at all. new: the rank's own folder. Raises OSError."""
    path = new / target.name
    try:
        with open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb", buffering=0
        ) as file:
            for part in (memoryview(header), page):
                at = 0
                while at < len(part):
                    at += file.write(part[at:])
        path.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def make_new_folder(folder: Path, rank: int, ranks: int) -> Path:
    """A rank's own folder for files that it writes; those of dead ones are removed. Raises OSError."""
    for old in folder.glob("new.*.*"):
        owner = int(old.name.split(".")[1])
        if owner == rank or (rank == 0 and owner >= ranks):
            away = old.with_name(f"dead.{secrets.token_hex(8)}")  # its writer, if it lives, does not find it any more
            old.rename(away)
            shutil.rmtree(away, ignore_errors=True)
    if rank == 0:
        for dead in folder.glob("dead.*"):
            shutil.rmtree(dead, ignore_errors=True)
    new = folder / f"new.{rank}.{secrets.token_hex(8)}"
    new.mkdir(mode=0o700)
    return new


def list_pages(folder: Path, heartbeat: Callable[[], None]) -> list[PageFile]:
    """The pages that are there, the least recently used first; files of which the others' are missing are removed.

    Before any rank writes. Raises OSError.
    """
    found: dict[tuple[bytes, int], tuple[int, int, int]] = {}  # key, ranks -> files, their size, when last used
    with os.scandir(pages_folder(folder)) as entries:
        for number, entry in enumerate(entries):
            if number % _SCAN_STEP == 0:
                heartbeat()
            match = _NAME.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            info = entry.stat(follow_symlinks=False)
            page = bytes.fromhex(match[1]), int(match[3])
            files, size, used = found.get(page, (0, 0, 0))
            found[page] = files + 1, size + -(-info.st_size // BLOCK) * BLOCK, max(used, info.st_mtime_ns)
    whole = []
    for (key, ranks), (files, size, used) in found.items():
        if files == ranks:
            whole.append((used, PageFile(key, size, ranks)))
        else:
            for rank in range(ranks):
                (pages_folder(folder) / file_name(key, rank, ranks)).unlink(missing_ok=True)
    return [page for _, page in sorted(whole)]


class FolderClaim:
    """An engine's hold on its folder, made here if need be. Raises ConfigError: in use, not ours, not writable."""

    def __init__(self, path: str) -> None:
        self._path, folder = path, Path(path)
        self._lock = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.stat()
            if info.st_uid != os.getuid():
                raise self._refused(
                    f"belongs to user {info.st_uid}, not to you ({os.getuid()}): name a folder of yours"
                )
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._take()
            pages_folder(folder).mkdir(mode=0o700, exist_ok=True)
            (folder / "digests").mkdir(mode=0o700, exist_ok=True)
            probe = folder / f"dead.{secrets.token_hex(8)}"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            self.close()
            raise self._refused(f"cannot be used: {error.strerror}; name a folder that you can write to") from error
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Safe to call twice. The lock's file stays: whoever has it open meanwhile must mean the same one."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> FolderClaim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace") or "another"
            raise self._refused(f"is in use by process {owner}: give each engine a folder of its own") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _refused(self, what: str) -> ConfigError:
        return ConfigError(f"--cache-dir {self._path} {what}", field="cache_dir")
