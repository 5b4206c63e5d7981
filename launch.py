"""The daemon's entry in a checkout; the installed command `vibe-sgl-lite` runs the same `main`."""

import sys

from vibe_sgl_lite.runtime.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
