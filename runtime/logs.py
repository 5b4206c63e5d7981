"""Logging to stderr, one format for the launcher and every child."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str) -> None:
    """Send the root logger's records to stderr, each with time, process and level. `level`: as in --log-level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter(f"%(asctime)s {process} %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _OneLineFormatter(logging.Formatter):
    """A record's message takes one line, whatever names are in it; only a traceback takes more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record), keep=" ")


def escaped(text: str, *, keep: str = "") -> str:
    """`text` with blanks, line breaks and other invisible characters as backslash escapes, but for those in `keep`."""
    if text.isprintable() and " " not in text:
        return text
    return "".join(char if char in keep or (char.isprintable() and char != " ") else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def one_line(text: object) -> str:
    """`text` with its line breaks and runs of blanks made single spaces, for messages that must be one line."""
    return " ".join(str(text).split())
