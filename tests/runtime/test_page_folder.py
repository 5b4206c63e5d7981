"""Files of pages: whole or not there, whatever happens to them; and one engine a folder."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.page_folder import (
    BLOCK,
    READ_BYTES,
    FolderClaim,
    PageFile,
    file_bytes,
    file_name,
    list_pages,
    make_new_folder,
    pack_header,
    pages_folder,
    read_page,
    write_page,
)

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
PAGE = bytes(range(256)) * 20


def heartbeat() -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with FolderClaim(str(tmp_path)):
        pass
    return tmp_path


def write(folder: Path, key: bytes, rank: int = 0, ranks: int = 1, page: bytes = PAGE) -> Path:
    new = next(folder.glob(f"new.{rank}.*"), None) or make_new_folder(folder, rank, ranks)
    path = pages_folder(folder) / file_name(key, rank, ranks)
    write_page(new, path, pack_header(key, rank, ranks, memoryview(page)), memoryview(page))
    return path


def read(path: Path, key: bytes = KEY, rank: int = 0, ranks: int = 1, size: int = len(PAGE)) -> bytes | None:
    page = bytearray(size)
    return bytes(page) if read_page(path, key, rank, ranks, memoryview(page)) else None


def test_what_is_written_is_read(folder: Path) -> None:
    path = write(folder, KEY)
    assert read(path) == PAGE
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size <= file_bytes(len(PAGE)) < path.stat().st_size + BLOCK
    assert [*folder.glob("new.*/*")] == []


def test_a_page_of_several_reads_is_checked_whole(folder: Path) -> None:
    page = os.urandom(2 * READ_BYTES + 5)
    path = write(folder, KEY, page=page)
    assert read(path, size=len(page)) == page
    whole = path.read_bytes()
    for back in (1, 6, READ_BYTES + 6, len(page)):
        path.write_bytes(whole[:-back] + bytes([whole[-back] ^ 1]) + whole[len(whole) - back + 1 :])
        assert read(path, size=len(page)) is None, f"{back} bytes before the end"


def test_a_file_with_any_byte_changed_is_none(folder: Path) -> None:
    path = write(folder, KEY)
    whole = path.read_bytes()
    header = len(whole) - len(PAGE)
    for at in (*range(header), header, header + 1, header + len(PAGE) // 2, len(whole) - 1):
        for bit in (1, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert read(path) is None, f"byte {at}"
    path.write_bytes(whole)
    assert read(path) == PAGE


def test_a_file_cut_or_grown_or_emptied_is_none(folder: Path) -> None:
    path = write(folder, KEY)
    whole = path.read_bytes()
    for damaged in (b"", whole[:1], whole[:59], whole[:60], whole[:61], whole[:-1], whole + b"\0", bytes(len(whole))):
        path.write_bytes(damaged)
        assert read(path) is None


def test_another_pages_file_under_this_name_is_none(folder: Path) -> None:
    path = write(folder, OTHER)
    assert read(path, OTHER) == PAGE
    assert read(path, KEY) is None
    assert read(path, OTHER, rank=1, ranks=2) is None
    assert read(path, OTHER, size=len(PAGE) // 2) is None
    assert read(path.with_name("missing")) is None
    assert read(folder) is None, "a folder is no file"


def test_what_cannot_be_written_leaves_nothing(folder: Path) -> None:
    """A file that may not grow, as on a full disk; and a name that is taken."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(PAGE) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(folder, KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [*folder.glob("new.*/*")] == [*pages_folder(folder).iterdir()] == []
    write(folder, KEY)
    (pages_folder(folder) / file_name(OTHER, 0, 1)).mkdir()
    with pytest.raises(OSError, match="directory"):
        write(folder, OTHER)
    assert [*folder.glob("new.*/*")] == []


def test_pages_are_listed_by_their_last_use_and_parts_of_pages_go(folder: Path) -> None:
    for number, (key, rank, ranks) in enumerate([(KEY, 0, 2), (OTHER, 0, 1), (KEY, 1, 2), (OTHER, 1, 3)]):
        os.utime(write(folder, key, rank, ranks), ns=(number, number))
    (pages_folder(folder) / "README").write_text("not ours")
    size = file_bytes(len(PAGE))
    assert list_pages(folder, heartbeat) == [PageFile(OTHER, size, 1), PageFile(KEY, 2 * size, 2)]
    names = {path.name for path in pages_folder(folder).iterdir()}
    assert names == {"README", file_name(OTHER, 0, 1), file_name(KEY, 0, 2), file_name(KEY, 1, 2)}


def test_a_dead_ranks_last_thread_writes_nowhere(folder: Path) -> None:
    old = make_new_folder(folder, 0, 1)
    others = make_new_folder(folder, 1, 2)
    (old / "half").write_bytes(b"half of a page")
    new = make_new_folder(folder, 0, 2)
    assert not old.exists()
    assert others.exists()
    with pytest.raises(OSError, match="No such file"):
        write_page(old, pages_folder(folder) / file_name(KEY, 0, 1), b"", memoryview(PAGE))
    make_new_folder(folder, 0, 1)
    assert not new.exists()
    assert not others.exists(), "a rank that there is no more"


def test_one_engine_a_folder(tmp_path: Path) -> None:
    program = "import sys, time\nfrom vibe_sgl_lite.runtime.page_folder import FolderClaim\n"
    program += "claim = FolderClaim(sys.argv[1])\nprint('claimed', flush=True)\ntime.sleep(60)\n"
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"claimed\n"
    with pytest.raises(ConfigError, match=f"in use by process {other.pid}: give each engine a folder of its own"):
        FolderClaim(str(tmp_path))
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with FolderClaim(str(tmp_path)):
        pass


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, reason in ((file, "File exists"), (file / "below", "Not a directory"), (Path("/proc/x"), "No such file")):
        with pytest.raises(ConfigError, match=rf"--cache-dir {path} cannot be used: {reason}"):
            FolderClaim(str(path))
    monkeypatch.setattr("os.getuid", lambda: 4711)
    with pytest.raises(ConfigError, match="belongs to user"):
        FolderClaim(str(tmp_path))
