"""The folder of compiled kernels: where it is, private to the user, and with whole files alone."""

import os
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vibe_sgl_lite.model_worker.kernel_cache import CacheError, default_cache_dir, is_ours, make_private, whole_file


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "vibe-sgl-lite"


@pytest.mark.parametrize("value", ["relative", "", "/dev/null", "/proc/none"])
def test_a_cache_that_cannot_be_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "vibe-sgl-lite"
    assert (f"the cache folder is {tmp_path}" in caplog.text) == value.startswith("/")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_without_a_home_the_cache_is_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(path: str) -> str:
        return path

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", nobody)  # as for a uid that /etc/passwd does not have
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_cache_dir() == tmp_path / f"vibe-sgl-lite-cache-{os.getuid()}"


def test_without_any_folder_the_error_names_them_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = [tmp_path / "one", tmp_path / "two"]
    for path in taken:
        path.write_text("")
    monkeypatch.setattr("vibe_sgl_lite.model_worker.kernel_cache.cache_folders", lambda: iter(taken))
    with pytest.raises(CacheError, match=r"there is no cache folder: .*one.*; .*two"):
        default_cache_dir()


def test_a_missing_folder_is_made_private(tmp_path: Path) -> None:
    make_private(tmp_path / "deep" / "cache")
    assert stat.S_IMODE((tmp_path / "deep" / "cache").stat().st_mode) == 0o700


def test_an_open_folder_is_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_link_is_no_folder_of_this_user(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="not a folder of this user"):
        make_private(tmp_path / "cache")


def test_only_a_file_that_nobody_else_can_write_is_ours(tmp_path: Path) -> None:
    path, link = tmp_path / "kernel", tmp_path / "link"
    assert not is_ours(path)
    path.write_text("built")
    link.symlink_to(path)
    for mode, ours in ((0o600, True), (0o755, True), (0o620, False), (0o602, False)):
        path.chmod(mode)
        assert is_ours(path) == ours
    path.chmod(0o600)
    assert not is_ours(link)
    assert not is_ours(tmp_path)


def test_a_file_appears_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    path.write_text("old")
    with whole_file(path, 0o600) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_stays_of_a_file_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "kernel.so", 0o600) as unfinished:
            unfinished.write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one_process_at_a_time_and_ends_with_it(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from vibe_sgl_lite.model_worker.kernel_cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as second:
            assert second.stdout is not None
            assert select.select([second.stdout], [], [], 0.5)[0] == []
            first.kill()
            assert second.stdout.readline() == b"held\n"
