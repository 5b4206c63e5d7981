"""Starts under odd circumstances: each serves, or is refused in one line with exit code 2; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.integration.daemon import READY_S, ROOT
from vibe_sgl_lite.runtime.settings.model_source import embedded_folder

NOBODY = 54_321  # a uid that /etc/passwd does not have
BECOME_NOBODY = ("unshare", "--user", f"--map-user={NOBODY}", "--")
FLAGS = ("--log-level", "error", "--num-threads", "1", "--max-total-tokens", "4096")


class Started:
    """What came of one start: the ready line or "", stderr, the exit code after SIGTERM."""

    def __init__(
        self,
        *flags: str,
        env: Mapping[str, str],
        cwd: str | Path | None = None,
        under: Sequence[str] = (),
    ) -> None:
        command = [*under, sys.executable, "-P", str(ROOT / "launch.py"), *FLAGS, *flags]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env},
            cwd=cwd,
        ) as process:
            assert process.stdout is not None
            self.ready = process.stdout.readline().decode()
            process.terminate()
            self.stderr = process.communicate(timeout=READY_S)[1].decode()
        self.code = process.returncode

    def served(self) -> bool:
        assert "Traceback" not in self.stderr, self.stderr
        return self.code == 0 and self.ready.startswith("ready ipc://")

    def refused(self) -> str:
        """The one line, when it was refused as it should be."""
        assert (self.code, self.ready) == (2, ""), self.stderr
        (line,) = [line for line in self.stderr.splitlines() if " ERROR " not in line]
        assert line.startswith("error: ")
        return line


@pytest.fixture
def base() -> Iterator[Path]:
    """A short folder that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.slow  # compiles the kernels into a cache of its own
@pytest.mark.skipif(
    subprocess.run((*BECOME_NOBODY, "true")).returncode != 0, reason="this machine lets nobody become another user"
)
def test_no_home_and_a_user_that_nobody_knows(base: Path) -> None:
    """As `docker run --user 54321`; with another user's XDG_RUNTIME_DIR, as su leaves it."""
    current = base / "current"
    current.mkdir()
    done = Started(env={"XDG_RUNTIME_DIR": "/proc", "TMPDIR": str(base)}, cwd=current, under=BECOME_NOBODY)
    assert done.served()
    assert f"ready ipc://{base}/vibe-sgl-lite-{NOBODY}/default/api.sock" in done.ready
    assert list(current.iterdir()) == []
    assert sorted(path.name for path in base.iterdir()) == [
        "current", f"vibe-sgl-lite-{NOBODY}", f"vibe-sgl-lite-cache-{NOBODY}"
    ]  # fmt: skip


@pytest.mark.slow  # compiles the kernels into a cache of its own
def test_relative_folders_and_names_with_line_breaks_on_a_terminal_that_has_ascii_alone(base: Path) -> None:
    model = base / "a modèl\nready"
    shutil.copytree(embedded_folder(), model)
    current = base / "current"
    current.mkdir()
    env = {
        "XDG_RUNTIME_DIR": "run", "XDG_CACHE_HOME": "cache", "TMPDIR": ".", "HOME": str(base / "home"),
        "HF_HOME": "hf", "LC_ALL": "C", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    done = Started("--model-path", str(model), "--name", base.name, env=env, cwd=current)
    assert done.served()
    assert r" model=a\x20mod\xe8l\x0aready device=cpu " in done.ready
    assert list(current.iterdir()) == []


def test_a_current_folder_that_was_removed(base: Path) -> None:
    gone = base / "gone"
    gone.mkdir()
    under = ("sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh")
    env = {"XDG_RUNTIME_DIR": str(base), "HOME": "/root"}
    assert Started(env=env, under=under).served()
    gone.mkdir()
    assert "model does not exist" in Started("--model-path", "model", env=env, under=under).refused()
    gone.mkdir()
    assert "--address ipc://x.sock" in Started("--address", "ipc://x.sock", env=env, under=under).refused()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "cuda"], "--device cuda: "),
        (["--model-path", "/tmp/caf\udce9"], "caf"),
        (["--model-path", "/nowhere\nat all"], "--model-path /nowhere at all does not exist"),
        (["--max-total-tokens", "100000000000"], "--max-total-tokens 100000000000 needs"),
    ],
)
def test_what_the_user_can_fix(base: Path, flags: list[str], says: str) -> None:
    done = Started(*flags, env={"XDG_RUNTIME_DIR": str(base), "HOME": "/root"})
    assert says in done.refused()
    assert "Traceback" not in done.stderr
    assert list((base / "vibe-sgl-lite").iterdir()) == [] if (base / "vibe-sgl-lite").exists() else True


@pytest.mark.parametrize(("kib", "may_do"), [(150_000, False), (900_000, True)])
def test_too_little_address_space(base: Path, kib: int, may_do: bool) -> None:
    """may_do: the embedded model mostly lacks a few megabytes of it at its last step, and at times has them."""
    under = ("sh", "-c", f'ulimit -v {kib}; exec "$@"', "sh")
    done = Started(env={"XDG_RUNTIME_DIR": str(base), "HOME": "/root"}, under=under)
    assert done.code == (0 if done.ready and may_do else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.ready or "ulimit -v" in done.stderr or "cannot be loaded" in done.stderr


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a file system without room")
@pytest.mark.parametrize("inodes", [1, 2, 3, 4, 5, 7, 9])
def test_a_run_directory_without_room(base: Path, inodes: int) -> None:
    """However far a start comes: it goes elsewhere, serves, or ends in one line."""
    run = base / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes},size=64k,mode=0700", "none", str(run)])
    if mounted.returncode != 0:
        pytest.skip("cannot mount here")
    try:
        done = Started("--name", base.name, env={"XDG_RUNTIME_DIR": str(run), "HOME": "/root"})
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert "Traceback" not in done.stderr
    assert done.code == (0 if done.ready else 2)
