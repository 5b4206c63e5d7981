"""Whether the machine's memory, or the container's, is nearly used up: then no new work is taken, before the kernel
kills a process for it. Requests that run go on: their pages were counted at the start."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import psutil

from vibe_sgl_lite.runtime.settings.machine import Limit, available_memory

LOW_BYTES = 48 * 2**20  # free: from here on nothing new is taken ...
ENOUGH_BYTES = 80 * 2**20  # ... until so much is
LOOK_S = 1.0
PACKAGE = "vibe_sgl_lite."

log = logging.getLogger(__name__)


class MemoryWatch:
    """Call `look` often. low: why nothing new may be taken; None while it may. read: what is free."""

    def __init__(self, read: Callable[[], Limit] = available_memory) -> None:
        self.low: str | None = None
        self._read = read
        self._free = read()
        self._next_look = 0.0

    def look(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        self._free = self._read()
        if self._free.value >= (LOW_BYTES if self.low is None else ENOUGH_BYTES):
            if self.low is not None:
                log.warning("there is memory again: %d MiB", int(self._free.value) >> 20)
            self.low = None
            return
        free = f"{int(self._free.value) >> 20} MiB of memory are free ({self._free.source})"
        if self.low is None:
            largest = max(resident_memory().items(), key=lambda item: item[1], default=("nobody", 0))
            log.warning("%s: no new requests; %s has the most, %d MiB", free, largest[0], largest[1] >> 20)
        self.low = free

    def values(self) -> dict[str, int | float | str | bool]:
        """For `health`: bytes."""
        values: dict[str, int | float | str | bool] = {"memory_low": self.low is not None}
        values["memory_free"] = int(self._free.value)
        for name, size in resident_memory().items():
            values[f"memory_{name}"] = size
        return values


def resident_memory() -> dict[str, int]:
    """Of each process of this engine, this one too, by its module; bytes, pages of files not counted."""
    found: dict[str, int] = {}
    try:
        for process in psutil.Process(os.getppid()).children():
            try:
                words = [word for word in process.cmdline() if word.startswith(PACKAGE)]
                memory = process.memory_info()
            except psutil.Error:
                continue  # it has just ended
            if words:
                name = words[-1].removeprefix(PACKAGE)
                found[name] = found.get(name, 0) + int(memory.rss - getattr(memory, "shared", 0))
    except psutil.Error:
        pass
    return found
