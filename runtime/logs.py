"""Logging to stderr, one format for the launcher and every child."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str) -> None:
    """Send the root logger's records to stderr, each with time, process and level. `level`: as in --log-level."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format=f"%(asctime)s {process} %(levelname)s %(message)s", force=True
    )


def one_line(text: object) -> str:
    """`text` with its line breaks and runs of blanks made single spaces, for messages that must be one line."""
    return " ".join(str(text).split())
