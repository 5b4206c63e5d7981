"""The installed command: `vibe-sgl-lite [flags]` serves; with a command's name first, it does that."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

COMMANDS = ("bench", "chat", "keygen", "plan", "top")


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in COMMANDS:
        with _ctrl_c_leaves(0):  # until the daemon has a handler of its own
            return int(importlib.import_module("vibe_sgl_lite.runtime.launcher.main").main(given))
    with _ctrl_c_leaves(130):
        run = importlib.import_module(f"vibe_sgl_lite.runtime.commands.{given[0]}").main
    try:
        return int(run(given[1:]))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader such as `head` has left
        return 0


@contextlib.contextmanager
def _ctrl_c_leaves(code: int) -> Iterator[None]:
    """While modules are imported, which takes some tenths of a second, Ctrl-C ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
