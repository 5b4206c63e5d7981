"""`vibe-sgl-lite keygen FILE`: a pair of keys, for an engine that listens beyond this machine or for one of its
clients.

FILE gets both keys and stays where it is used (--server-key, client_key); FILE.pub has the public one, for the other
side (a line of --client-keys, server_key).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.transport.curve import make_keys


def main(argv: Sequence[str]) -> int:
    """Exit code 2 when the file is there already or cannot be written."""
    parser = argparse.ArgumentParser(prog="vibe-sgl-lite keygen", description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    try:
        print(make_keys(parser.parse_args(argv).file))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
