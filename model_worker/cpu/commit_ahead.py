"""Makes memory ready before it is needed.

The first write to a page of memory waits for the system to find and clear it: 1 ms for a huge page on a machine of its
own, 5 ms on virtual machines whose host has to find it too. In the middle of a step one thread would do that while the
others wait for it, and beside a step it takes a core from one of them, for which the others wait too.
"""

import ctypes
import logging
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

MADV_POPULATE_WRITE = 23  # Linux 5.14 and later; leaves what is there as it is
STEP_BYTES = 2 << 20  # at a time: a huge page on x86
NICENESS = 19
MOST_THREADS = 4

logger = logging.getLogger(__name__)


class CommitAhead:
    """Commits the memory of `data`, [rows, ...]: of rows that a step is about to use at once, on several threads; and
    while there are no steps, on a thread of low priority, of some rows ahead of the last one used.

    That thread starts with the first rows, at once, and ends with the last one, or where the system does not know how,
    or when nobody has `data` any more. data must begin where a page of memory does.
    """

    def __init__(self, data: Tensor, rows_ahead: int, threads: int = 1) -> None:
        """threads: which wait for a step's memory, so that they may as well find it."""
        self._data = weakref.ref(data, lambda _: self._more.set())
        self._nbytes = data.nbytes
        self._row_bytes = data.stride(0) * data.element_size()
        self._rows_ahead = rows_ahead
        self._at_least = 0  # rows
        self._highest = -1
        self._rests = self._steps = False
        self._committed = 0  # bytes from the start of `data`
        self._can = True
        self._threads = min(threads, MOST_THREADS)
        self._helpers = ThreadPoolExecutor(self._threads - 1, "commit") if self._threads > 1 else None
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._more = threading.Event()
        self._more.set()
        self.thread = threading.Thread(target=self._run, name="commit-ahead", daemon=True)
        self.thread.start()

    def at_least(self, rows: int) -> None:
        """So many rows from the start in any case."""
        self._at_least = max(self._at_least, rows)
        self._more.set()

    def rest(self, rests: bool) -> None:
        """Whether to leave the cores to others meanwhile."""
        self._rests = rests
        self._more.set()

    def idle(self) -> None:
        """No step runs, nor is one known to come."""
        if self._steps:
            self._steps = False
            self._more.set()

    def reached(self, row: int) -> None:
        """A step is about to use rows up to this one. Returns when they are ready."""
        self._steps = True
        if row <= self._highest:
            return
        self._highest = row
        begin, end = self._committed, min((row + 1) * self._row_bytes, self._nbytes)
        if begin >= end or not self._can:
            return
        together = self._threads * STEP_BYTES
        end = min(begin + -(-(end - begin) // together) * together, self._nbytes)
        shares = [range(begin + place * STEP_BYTES, end, together) for place in range(self._threads)]
        helped = [] if self._helpers is None else [self._helpers.submit(self._commit, share) for share in shares[1:]]
        self._commit(shares[0])
        for share in helped:
            share.result()
        self._committed = max(self._committed, end)

    @property
    def committed_bytes(self) -> int:
        """So much of `data` is ready, from its start."""
        return self._committed

    def _commit(self, places: range) -> bool:
        """STEP_BYTES at each of these places, in bytes from the start; whether that is done."""
        for place in places:
            data = self._data()
            if data is None:
                return False
            size = min(STEP_BYTES, self._nbytes - place)
            if self._madvise(data.data_ptr() + place, size, MADV_POPULATE_WRITE) != 0:
                error = ctypes.get_errno()
                if self._can:
                    logger.info("memory is committed as it is written: %s", os.strerror(error))
                self._can = False
                return False
        return True

    def _wanted(self) -> int:
        if self._rests or self._steps:
            return 0
        rows = max(self._highest + 1 + self._rows_ahead, self._at_least)
        return min(rows * self._row_bytes, self._nbytes)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while self._committed < self._nbytes:
            self._more.wait()
            self._more.clear()
            while (begin := self._committed) < self._wanted():
                if not self._commit(range(begin, begin + 1)):
                    return
                self._committed = max(self._committed, begin + STEP_BYTES)
            if self._data() is None:
                return
