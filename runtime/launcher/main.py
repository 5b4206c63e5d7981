"""The daemon, behind `launch.py` and the installed command.

Parses flags, runs the pipeline and prints one line on stdout when it can serve.

Exit code 0 after SIGTERM, SIGHUP or Ctrl-C, 1 when a process failed, 2 when the user can fix it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from vibe_sgl_lite.runtime.errors import StartupError, UserError
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.watch import DRAIN_S, HURRY_S
from vibe_sgl_lite.runtime.logs import escaped, one_line, setup_logging
from vibe_sgl_lite.runtime.settings.cli import parse

log = logging.getLogger(__name__)

READY = (
    "ready {address} model={model} device={device} dtype={dtype} tp={tp} kv_pages={kv_pages} page_size={page_size} "
    "startup={startup:.2f}"
)
STOPPING = (
    f"stopping: requests that run get up to {DRAIN_S:.0f} s to finish, new ones are refused; "
    "Ctrl-C or SIGTERM once more aborts them"
)
HURRYING = "stopping now: requests that still run are aborted"
TELL_S = 0.5
READY_NODE = "ready node={node} ranks={ranks} startup={startup:.2f}"  # of a node that only hosts ranks


def main(argv: Sequence[str] | None = None) -> int:
    # Imports are CPU time. The system's own record of a process's start is off by up to a second on Linux.
    started = time.monotonic() - time.process_time()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        setup_logging("launcher", args.log_level)
        return _serve(Pipeline(args, started=started, on_progress=_show_progress))
    except UserError as error:
        return _fail(error, 2)
    except StartupError as error:
        return _fail(error, 2 if error.user else 1)


def _serve(pipeline: Pipeline) -> int:
    signals = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if not pipeline.request_stop(DRAIN_S if signals == 1 else HURRY_S):
            raise SystemExit(0)  # nothing was started yet

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, on_signal)
    try:
        facts = pipeline.start()
    except StartupError:
        if signals and pipeline.failure is None:
            return 0
        raise
    shown = {name: escaped(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
    ready = READY_NODE if "node" in facts else READY + (" http={http}" if "http" in facts else "")
    _say(ready.format(**shown))
    told = 0
    while not pipeline.wait(TELL_S):
        if signals > told:  # once it is plain that requests run: most stops are over by then
            told = signals
            log.warning("%s", STOPPING if signals == 1 else HURRYING)
    return 0 if pipeline.failure is None else _fail(pipeline.failure, 1)


def _show_progress(ready: int, of: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if ready == of else ""
        sys.stderr.write(f"\rstarting: {ready} of {of} processes ready{end}")
        sys.stderr.flush()


def _say(line: str) -> None:
    """On stdout, which may be a terminal or a pipe that has ASCII alone, and may be closed."""
    with contextlib.suppress(OSError):
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {one_line(error)}\n")
    return code
