"""The daemon's entry in a checkout; the installed command `vibe-sgl-lite` runs the same `main`."""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))  # Ctrl-C during the imports: no traceback

from vibe_sgl_lite.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
