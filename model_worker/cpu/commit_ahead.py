"""Makes memory ready before it is needed.

The first write to a page of memory waits for the system to find and clear it: 1 ms for a huge page on a machine of its
own, 5 ms on virtual machines whose host has to find it too. Steps should not wait for that.
"""

import ctypes
import logging
import os
import threading
import weakref

from torch import Tensor

MADV_POPULATE_WRITE = 23  # Linux 5.14 and later; leaves what is there as it is
STEP_BYTES = 2 << 20  # at a time: a huge page on x86
NICENESS = 19

logger = logging.getLogger(__name__)


class CommitAhead:
    """A thread of low priority that commits the memory of `data`, [rows, ...], some rows ahead of the last one used.

    It starts with the first rows, at once, and ends with the last one, or where the system does not know how, or when
    nobody has `data` any more. data must begin where a page of memory does.
    """

    def __init__(self, data: Tensor, rows_ahead: int) -> None:
        self._data = weakref.ref(data, lambda _: self._more.set())
        self._nbytes = data.nbytes
        self._row_bytes = data.stride(0) * data.element_size()
        self._rows_ahead = rows_ahead
        self._at_least = 0  # rows
        self._highest = -1
        self._rests = False
        self._committed = 0  # bytes from the start of `data`
        self._more = threading.Event()
        self._more.set()
        self.thread = threading.Thread(target=self._run, name="commit-ahead", daemon=True)
        self.thread.start()

    def at_least(self, rows: int) -> None:
        """So many rows from the start in any case."""
        self._at_least = rows
        self._more.set()

    def rest(self, rests: bool) -> None:
        """Whether to leave the cores to others meanwhile."""
        self._rests = rests
        self._more.set()

    def reached(self, row: int) -> None:
        """`row` is in use, or soon will be."""
        if row > self._highest:
            self._highest = row
            if self._wanted() > self._committed:
                self._more.set()

    @property
    def committed_bytes(self) -> int:
        """So much of `data` is ready, from its start."""
        return self._committed

    def _wanted(self) -> int:
        rows = max(self._highest + 1 + self._rows_ahead, self._at_least)
        return min(rows * self._row_bytes, self._nbytes)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        while self._committed < self._nbytes:
            self._more.wait()
            self._more.clear()
            while self._committed < self._wanted() and not self._rests:
                data = self._data()
                if data is None:
                    return
                size = min(STEP_BYTES, self._nbytes - self._committed)
                if madvise(data.data_ptr() + self._committed, size, MADV_POPULATE_WRITE) != 0:
                    error = ctypes.get_errno()
                    logger.info("memory is committed as it is written: %s", os.strerror(error))
                    return
                self._committed += size
                del data
            if self._data() is None:
                return
