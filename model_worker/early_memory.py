"""Memory in huge pages, and its first touch, before anything else of a rank is there. Imports nothing heavy.

The first write to a huge page waits for the system to find and clear it: 0.3 ms on a machine of its own, 5 ms on
virtual machines whose host has to find it too, which is seconds for a model's weights. A rank's imports take as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

HUGE_PAGE_BYTES = 2 << 20  # on x86, and on Arm with 4 KiB pages


def reserve(size: int) -> memoryview:
    """Zeros that begin where a huge page does, and are in such where there are any; committed as they are written."""
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # no huge pages: everything works, a little slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -_address(memory) % HUGE_PAGE_BYTES
    return memoryview(memory)[start : start + size]


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class EarlyMemory:
    """Memory of `size` bytes as `reserve` gives it, which a thread commits, from its start on, until it is taken."""

    def __init__(self, size: int) -> None:
        self._memory: memoryview | None = reserve(size)
        self._wanted = False
        self._thread = threading.Thread(target=self._touch, args=(_address(self._memory), size), daemon=True)
        self._thread.start()

    def take(self) -> memoryview | None:
        """The memory, all zeros; None the second time."""
        self._wanted = True
        self._thread.join()  # it writes: at most one more page
        memory, self._memory = self._memory, None
        return memory

    def _touch(self, address: int, size: int) -> None:
        """A zero to each page. Not by madvise, which would hold up all that maps memory meanwhile, such as imports."""
        write = ctypes.CDLL(None).memset  # lets other threads run Python
        write.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        for offset in range(0, size, HUGE_PAGE_BYTES):
            if self._wanted:
                return
            write(address + offset, 0, 1)
