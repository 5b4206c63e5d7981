"""Calls that any thread makes and one thread runs, which sleeps in a poll: a queue, and a socket that wakes it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable


class Commands:
    """alive: whether the thread that runs them is. wakes: a socket, readable when there may be some.

    closed: no more are taken.
    """

    def __init__(self, alive: Callable[[], bool]) -> None:
        self.closed = False
        self._alive = alive
        self._lock = threading.RLock()  # reentrant: garbage collection may run `post` inside `post`
        self._commands: deque[Callable[[], None]] = deque()
        self.wakes, self._wake = socket.socketpair()
        self.wakes.setblocking(False)
        self._wake.setblocking(False)

    def post(self, command: Callable[[], None]) -> bool:
        """From any thread. False: nobody is there to run it."""
        with self._lock:
            if self.closed or not self._alive():  # not alive also in the child of a fork
                return False
            self._commands.append(command)
        try:
            self._wake.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already
        except OSError:
            pass  # disposed of in between: `close` has run the command
        return True

    def run(self) -> None:
        """What there is."""
        with contextlib.suppress(BlockingIOError):  # something else woke the thread
            self.wakes.recv(4096)
        while self._commands:
            self._commands.popleft()()

    def close(self) -> None:
        """Run what there is, and take no more."""
        with self._lock:
            self.closed = True
        self.run()

    def dispose(self) -> None:
        """After `close`."""
        self.wakes.close()
        self._wake.close()
