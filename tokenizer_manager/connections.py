"""No more connections than there are descriptors for: libzmq ends the process when it cannot accept one.

It has no limit of its own. So the socket stops to listen while half of the descriptors are used; who connects meanwhile
tries again, as ZeroMQ does by itself.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Sequence

import psutil
import zmq

from vibe_sgl_lite.runtime.transport.channels import bind_ipc

MOST_DESCRIPTORS = 65_536
PAUSE_S = 1.0  # at least, between closing and listening again: the file of the socket goes a little later

log = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """To what the system allows this process, within reason. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return min(soft, MOST_DESCRIPTORS) if soft != resource.RLIM_INFINITY else MOST_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class ConnectionLimit:
    """Of a bound socket. events: to be polled; call `check` when there are any, and now and then."""

    def __init__(self, socket: zmq.Socket[bytes], addresses: Sequence[str], descriptors: int) -> None:
        self.events = socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
        self._socket = socket
        self._addresses = addresses
        self._most = descriptors // 2
        self._process = psutil.Process()
        self._closed_at: float | None = None

    def check(self, now: float) -> None:
        """now: monotonic seconds."""
        while True:
            try:
                self.events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
        if self._closed_at is None:
            used = self._process.num_fds()
            if used >= self._most:
                for address in self._addresses:
                    self._socket.unbind(address)
                self._closed_at = now
                log.warning("%d file descriptors are used: no more clients may connect for now", used)
        elif now - self._closed_at >= PAUSE_S and self._process.num_fds() < self._most * 3 // 4:
            for address in self._addresses:
                bind_ipc(self._socket, address)
            self._closed_at = None
            log.info("clients may connect again")

    def close(self) -> None:
        self._socket.disable_monitor()
        self.events.close()
