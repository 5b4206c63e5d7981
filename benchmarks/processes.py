"""What the processes of an engine have taken of memory. Needs psutil alone, so that any engine's environment has it."""

from __future__ import annotations

from pathlib import Path

import psutil


def peak_memory() -> dict[str, float]:
    """Peak resident MB of each child process, by its module's name; where the system keeps no peak, what it is now."""
    peaks: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        name = module_name(process.cmdline()) or process.name()
        while name in peaks:
            name += "'"
        peaks[name] = round(peak_mb(process), 1)
    return peaks


def module_name(command: list[str]) -> str | None:
    """The module that a command line of Python runs, seen through the boot module of our own processes; or None."""
    if "-m" not in command:
        return None
    module, *arguments = command[command.index("-m") + 1 :]
    return arguments[0] if module == "vibe_sgl_lite.runtime.launcher.boot" else module


def peak_mb(process: psutil.Process) -> float:
    """Peak resident MB of one process; where the system keeps no peak, what it is now."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    rss: int = process.memory_info().rss
    return rss / 2**20
