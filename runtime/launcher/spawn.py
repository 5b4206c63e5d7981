"""Starting and ending one child process. Knows nothing of messages; `runtime/launcher/watch.py` decides when."""

from __future__ import annotations

import contextlib
import os
import signal
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil

from vibe_sgl_lite.runtime.launcher.boot import LIFE_PIPE_ENV, LOAD_FAILED, STANDBY
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RANK_PREFIX = "model_worker."
HTTP_SERVER = "http_server"
STACK_DUMP_S = 0.3  # what children get to write their stacks before they are killed
REAP_S = 5.0


class ChildSpec(msgspec.Struct, frozen=True):
    """One process to start: its name on the control line, its entry module, and arguments after the spec file."""

    name: str
    module: str
    extra: tuple[str, ...] = ()

    @property
    def is_rank(self) -> bool:
        return self.name.startswith(RANK_PREFIX)


def pipeline_children(args: ServerArgs) -> tuple[ChildSpec, ...]:
    """The engine's processes on this node. Ranks come first: they take longest to start; other nodes have only them."""
    ranks = tuple(
        ChildSpec(f"{RANK_PREFIX}{rank}", "vibe_sgl_lite.model_worker.process", (str(rank),))
        for rank in args.local_ranks
    )
    if args.node_rank > 0:
        return ranks
    return (
        *ranks,
        ChildSpec("tokenizer_manager", "vibe_sgl_lite.tokenizer_manager.process"),
        ChildSpec("scheduler", "vibe_sgl_lite.scheduler.process"),
        ChildSpec("detokenizer", "vibe_sgl_lite.detokenizer.process"),
        *_http_servers(args),
    )


def _http_servers(args: ServerArgs) -> tuple[ChildSpec, ...]:
    """The first one opens the port, the others get it from there."""
    if args.no_http:
        return ()
    names = (HTTP_SERVER, *(f"{HTTP_SERVER}.{worker}" for worker in range(1, args.http_workers)))
    module = "vibe_sgl_lite.http_server.process"
    return tuple(ChildSpec(name, module, (str(worker),)) for worker, name in enumerate(names))


class ChildProcess:
    """A started child, in a session of its own, so that a terminal's Ctrl-C reaches the launcher alone.

    Its stdout goes to our stderr: the launcher's stdout carries the ready line and nothing else.
    spec_file: None for one that only does its imports, until `start` is called.
    """

    def __init__(self, spec: ChildSpec, spec_file: Path | None, threads: int, life_fd: int) -> None:
        self.spec = spec
        self._popen = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "vibe_sgl_lite.runtime.launcher.boot",
                spec.module,
                STANDBY if spec_file is None else str(spec_file),
                *spec.extra,
            ],
            env=_environment(os.environ, threads if spec.is_rank else 1, life_fd),
            stdin=subprocess.DEVNULL if spec_file is not None else subprocess.PIPE,
            stdout=2,
            pass_fds=(life_fd,),
            start_new_session=True,
        )
        self.pid = self._popen.pid

    def start(self, spec_file: Path) -> None:
        """Let one that has been made without a spec file begin. That it has died meanwhile is seen as of any other."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._popen.stdin as pipe:
            pipe.write(os.fsencode(spec_file))

    @property
    def name(self) -> str:
        return self.spec.name

    def exit_code(self) -> int | None:
        """None while it runs; as subprocess has it, minus the signal's number when one killed it."""
        return self._popen.poll()

    def exit_words(self) -> str:
        """How it ended, for people."""
        code = self._popen.poll()
        if code is None:
            return "is still running"
        if code == LOAD_FAILED:
            return "could not be loaded (the line above says why)"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, a debugger) holds it."""
        try:
            return str(psutil.Process(self.pid).status()) == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def dump_stacks(self) -> None:
        """Ask for a stack dump on stderr, which takes up to STACK_DUMP_S. A stopped process cannot write one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL it and whatever it started (all of it is in its process group)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when all are zombies
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self, timeout_s: float = REAP_S) -> bool:
        """Wait for the end of a killed child. False: the system has not let go of it yet, which takes long where it has
        much memory to free or waits for a device; it is collected when another child starts."""
        try:
            self._popen.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True


def _environment(base: Mapping[str, str], threads: int, life_fd: int) -> dict[str, str]:
    env = dict(base)
    env.update({name: str(threads) for name in THREAD_VARIABLES})
    env[LIFE_PIPE_ENV] = str(life_fd)
    env["PYTHONUNBUFFERED"] = "1"
    root = os.path.realpath(Path(__file__).parents[3])  # what holds vibe_sgl_lite/, the way this module was found
    if root not in {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, base.get("PYTHONPATH")]))  # a checkout, not installed
    return env
