"""No more connections than there are descriptors for: libzmq ends the process when it cannot accept one.

It has no limit of its own, and to stop listening would end the connections that there are. So those that come while
half of the descriptors are in use are shut down as soon as they are seen; ZeroMQ then lets go of them. Who connected
tries again by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import zmq
from zmq.utils.monitor import parse_monitor_message

log = logging.getLogger(__name__)


class ConnectionLimit:
    """Of a bound socket. events: to be polled; call `check` when there are any."""

    def __init__(self, watched: zmq.Socket[bytes], descriptors: int) -> None:
        self.events = watched.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.refused_total = 0
        self._watched = watched
        self._most = descriptors // 2
        self._open: dict[int, None] = {}  # descriptors of connections, in order of arrival

    def check(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self.events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open[event["value"]] = None
            else:
                self._open.pop(event["value"], None)
        for _ in range(len(self._open) - self._most):
            if not self.refused_total:
                log.warning(
                    "%d clients are connected: as many as file descriptors allow; no more are taken", self._most
                )
            self.refused_total += 1
            _shut(self._open.popitem()[0])

    def close(self) -> None:
        self._watched.disable_monitor()
        self.events.close()


def _shut(descriptor: int) -> None:
    """Whose descriptor it is notices and closes it."""
    with contextlib.suppress(OSError):  # it is gone already
        copy = socket.socket(fileno=os.dup(descriptor))
        with copy:
            copy.shutdown(socket.SHUT_RDWR)
