"""How a child process starts.

`python -P -m vibe_sgl_lite.runtime.launcher.boot MODULE SPEC [RANK]` runs MODULE as `__main__`.

With `--standby` in place of SPEC it does the module's imports, waits until its standard input says which file it is,
and goes on with that; it leaves when the input ends without a word.

What must hold from a child's first moment is set up here, before its module's imports (torch alone takes seconds): it
dies with the launcher, Ctrl-C does not reach it, and it can be asked for a stack dump. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator

LIFE_PIPE_ENV = "VIBE_SGL_LITE_LIFE_FD"  # read end of a pipe that only the launcher holds open for writing
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
STANDBY_NICE = 5
STANDBY_SESSION_NICE = 19
AUTOGROUP = "/proc/self/autogroup"
AUTOGROUP_TRIES, AUTOGROUP_TRY_S = 500, 0.02  # of unprivileged processes, one in 0.1 s may change its session's
STANDBY = "--standby"
LOAD_FAILED = 3  # exit code; one line on stderr says why


def prepare_child() -> None:
    """Die with the parent, leave its signals to it, dump all stacks on SIGUSR1. A second call is harmless."""
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _die_with_parent()


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG on Linux, backed everywhere by a pipe whose end-of-file means that the launcher is gone."""
    fd = os.environ.pop(LIFE_PIPE_ENV, None)
    if fd is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch(pipe: int) -> None:
        os.read(pipe, 1)  # returns only at end of file: nobody writes
        os.killpg(0, signal.SIGKILL) if os.getpgid(0) == os.getpid() else os._exit(1)

    os.set_inheritable(int(fd), False)
    threading.Thread(target=watch, args=(int(fd),), name="life", daemon=True).start()


def _show(name: str) -> None:
    """What `ps` and `top` call this process; until then a spare one is just another python."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15])


def _stand_by(module: str) -> str:
    """Import what `module` imports, and what it says in `prepare`, and wait for the spec file's name. Exits when nobody
    wants this process."""
    set_session_nice(STANDBY_SESSION_NICE)
    imports = threading.Thread(target=_import_at_leisure, args=(module,), name="imports", daemon=True)
    imports.start()
    spec_file = os.fsdecode(sys.stdin.buffer.read())
    if not spec_file:
        os._exit(0)
    set_session_nice(0)
    imports.join()
    return spec_file


def set_session_nice(nice: int) -> None:
    """How this process's session stands among others. Where Linux shares the cores among sessions first, a thread's own
    niceness counts within its session alone, and each child of the launcher has one of its own."""
    for _ in range(AUTOGROUP_TRIES):
        try:
            with open(AUTOGROUP, "w") as file:
                file.write(str(nice))
            return
        except BlockingIOError:
            time.sleep(AUTOGROUP_TRY_S)
        except OSError:  # not this kind of system
            return


def _import_at_leisure(module: str) -> None:
    """In a thread of lower priority (on Linux each has its own), for what serves comes first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), STANDBY_NICE)
    with contextlib.suppress(ImportError, MemoryError, OSError):  # they will be met again, and told
        imported = importlib.import_module(module)
        if hasattr(imported, "prepare"):
            imported.prepare()
    sys.modules.pop(module, None)  # it is to run as __main__


@contextlib.contextmanager
def loading(module: str) -> Iterator[None]:
    """End in one line where something is missing, or a limit too low: the user's to fix."""
    try:
        yield
    except (ImportError, MemoryError, OSError) as error:
        sys.stderr.write(f"{module} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(LOAD_FAILED)


def main() -> None:
    prepare_child()
    try:
        os.getcwd()
    except FileNotFoundError:  # it was removed, and libraries do not expect that
        os.chdir("/")
    module = sys.argv[1]
    del sys.argv[1]
    if sys.argv[1] == STANDBY:
        sys.argv[1] = _stand_by(module)
    _show(module.split(".")[-2])
    with loading(module):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
