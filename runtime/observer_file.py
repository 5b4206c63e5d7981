"""A file of somebody who watches the engine (a trace, a timeline), which must never harm it: when it cannot be written,
a full disk for one, it switches itself off with one warning."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class ObserverFile:
    """Written anew, readable by its owner alone. Raises OSError when it cannot be made; nothing later raises."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")

    def write(self, data: bytes) -> None:
        if not self._file.closed:
            try:
                self._file.write(data)
            except OSError as error:
                self._switch_off(error)

    def close(self, end: bytes = b"", instead_of: int = 0) -> None:
        """Ends the file, with `end` in place of its last so many bytes."""
        if not self._file.closed:
            try:
                self._file.seek(-instead_of, os.SEEK_CUR)
                self._file.write(end)
                self._file.close()
            except OSError as error:
                self._switch_off(error)

    def _switch_off(self, error: OSError) -> None:
        log.warning("%s cannot be written any more and ends here: %s", self._path, error.strerror)
        with contextlib.suppress(OSError):
            self._file.close()
