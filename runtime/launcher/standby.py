"""Spare processes that have done a rank's imports, so that a restart skips them: torch alone takes seconds.

They are no children of the pipeline yet: nobody waits for them or misses them, and they end with the launcher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vibe_sgl_lite.runtime.launcher.spawn import ChildProcess, ChildSpec
from vibe_sgl_lite.runtime.settings.machine import available_memory, total_memory

FIRST_S = 5.0  # after the engine is ready: its first requests, and engines that live for seconds, go undisturbed
AGAIN_S = 10.0  # between two starts of one that nobody has taken: spares that die must not take up a core
# Where less memory is free, restarts are slow instead. A model that leaves so little is long in loading anyway.
FREE_BYTES, FREE_SHARE = 1 << 30, 1 / 5

log = logging.getLogger(__name__)


class Standby:
    """One spare for each of `specs`, once `keep` is called."""

    def __init__(self, specs: Sequence[ChildSpec], threads: int, life_fd: int) -> None:
        self._specs = specs
        self._threads = threads
        self._life_fd = life_fd
        self._spares: dict[str, ChildProcess] = {}
        self._due = time.monotonic() + FIRST_S

    def keep(self) -> None:
        """Start what is missing, if it is time to; call it again and again."""
        now = time.monotonic()
        for name, spare in list(self._spares.items()):
            if spare.exit_code() is not None:
                log.info("the spare process of %s %s", name, spare.exit_words())
                del self._spares[name]
        missing = [spec for spec in self._specs if spec.name not in self._spares]
        if not missing or now < self._due:
            return
        self._due = now + AGAIN_S
        try:
            if available_memory().value >= max(FREE_BYTES, FREE_SHARE * total_memory()):
                for spec in missing:
                    self._spares[spec.name] = ChildProcess(spec, None, self._threads, self._life_fd)
        except OSError as error:  # too many processes or files: whoever serves does without
            log.info("no spare process can be started: %s", error)

    def take(self, name: str) -> ChildProcess | None:
        """The spare of the child called `name`, if it is there; to be started. The next `keep` makes another."""
        spare = self._spares.get(name)
        if spare is not None and spare.exit_code() is not None:
            return None
        self._due = 0.0
        return self._spares.pop(name, None)

    def close(self) -> None:
        for spare in self._spares.values():
            spare.kill()
        for spare in self._spares.values():
            spare.reap()
        self._spares.clear()
