"""The installed command: `vibe-sgl-lite [flags]` serves; with a command's name first, it does that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from vibe_sgl_lite.runtime.launcher.main import main as serve

COMMANDS = ("bench", "chat", "keygen", "plan", "top")


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in COMMANDS:
        return serve(given)
    run = importlib.import_module(f"vibe_sgl_lite.runtime.commands.{given[0]}").main
    try:
        return int(run(given[1:]))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader such as `head` has left
        return 0


if __name__ == "__main__":
    sys.exit(main())
