"""A real daemon for tests: `python launch.py` in its own process, found again by its name."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil

from vibe_sgl_lite import AsyncClient, Client

ROOT = Path(__file__).resolve().parent.parent.parent
READY_S = 120.0  # a busy machine, and the kernels' first compilation
PROCESS_NAMES = {
    "vibe_sgl_lite.tokenizer_manager.process": "tokenizer_manager",
    "vibe_sgl_lite.scheduler.process": "scheduler",
    "vibe_sgl_lite.detokenizer.process": "detokenizer",
    "vibe_sgl_lite.model_worker.process": "model_worker",
    "vibe_sgl_lite.http_server.process": "http_server",
}


class Daemon:
    """`with Daemon("--page-size", "4") as daemon: daemon.client()`. Killed at the end if a test has not ended it.

    under: a command that runs launch.py as its own process, in a network namespace for example. standby: with spare
    processes for its ranks, which cost seconds of CPU time.
    """

    def __init__(self, *flags: str, name: str | None = None, under: Sequence[str] = (), standby: bool = False) -> None:
        self.name = name or f"test-{secrets.token_hex(4)}"
        self._folder = tempfile.TemporaryDirectory(prefix="daemon-")
        self._log = Path(self._folder.name) / "stderr"
        self.ready_line = ""
        self._tree: list[psutil.Process] = []
        # One thread: with more, a machine that is busy with the tests themselves makes OpenMP's barriers very slow.
        settings = ["--name", self.name, "--log-level", "warning", "--num-threads", "1"]
        settings += [] if standby else ["--no-standby"]
        settings += [] if "--port" in flags else ["--no-http"]  # daemons of one machine must not share a port
        command = [*under, sys.executable, str(ROOT / "launch.py"), *settings, *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that a test can press Ctrl-C on all of it
            )

    def wait_ready(self) -> dict[str, str]:
        """The ready line as a dict, with `address` where it serves. AssertionError with the log when none comes."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_S)
        line = self.process.stdout.readline() if readable else ""
        self.ready_line = line
        words = line.split()
        assert words[:1] == ["ready"], f"no ready line but {line!r}; log:\n{self.log()}"
        self._tree = self.descendants()
        address = {} if "=" in words[1] else {"address": words[1]}
        return address | dict(word.split("=", 1) for word in words[1:] if "=" in word)

    @property
    def address(self) -> str:
        """The default address of this daemon's name."""
        from vibe_sgl_lite.runtime.transport.rundir import default_address

        return default_address(self.name)

    def client(self) -> Client:
        return Client(name=self.name)

    def async_client(self) -> AsyncClient:
        return AsyncClient(name=self.name)

    def log(self) -> str:
        """All that it and its children wrote to stderr."""
        return self._log.read_text(errors="replace")

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def children(self) -> dict[str, psutil.Process]:
        """The engine's processes by name; ranks as model_worker.0 and so on, spare ones for them as standby.0."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children():
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:  # just now, or a zombie
                continue
            module = next((word for word in line if word in PROCESS_NAMES), None)
            if module is not None:
                name = PROCESS_NAMES[module]
                if name == "model_worker":
                    spare = "--standby" in line and process.name() != name
                    name = f"{'standby' if spare else name}.{line[-1]}"
                found[name] = process
        return found

    def wait_exit(self, timeout: float = 40.0) -> int:
        return self.process.wait(timeout)

    def rest_of_stdout(self) -> str:
        """What came on stdout after the ready line; to be called once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def survivors(self, within: float = 0.0) -> list[psutil.Process]:
        """Who of the whole tree still runs after `within` seconds."""
        return alive_after(self._tree, within)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait_exit()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(3 if kind else 40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if error is not None:
            sys.stderr.write(self.log())
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._folder.cleanup()


def alive_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Who still runs; a zombie, which only waits for a slow init to collect it, does not."""
    psutil.wait_procs(processes, timeout=seconds)
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def model_flags() -> dict[str, list[str]]:
    """The models to test, by id: the embedded one, and what QWEN3_MODEL names, with dummy weights where it has none."""
    flags: dict[str, list[str]] = {"embedded": []}
    real = os.environ.get("QWEN3_MODEL")
    if real:
        has_weights = not Path(real).is_dir() or any(Path(real).glob("*.safetensors"))
        flags["qwen3"] = ["--model-path", real, *([] if has_weights else ["--load-format", "dummy"])]
    return flags


@contextmanager
def running(*flags: str, standby: bool = False) -> Iterator[Daemon]:
    """A daemon that is ready."""
    with Daemon(*flags, standby=standby) as daemon:
        daemon.wait_ready()
        yield daemon


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> None:
    """Poll `condition()` until it is true; AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.05)
