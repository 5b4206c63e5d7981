"""One connection attempt of a client: a DEALER socket, and its monitor, which tells at once when the peer is gone.

A socket is used for one session and then closed, never reconnected: after a loss the next session starts on a new one.
Knows nothing of requests and of time.
"""

from __future__ import annotations

import logging
import socket

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from vibe_sgl_lite.runtime.messages import Chunks, ServerMessage
from vibe_sgl_lite.runtime.transport.channels import DECODE_ERRORS, new_socket
from vibe_sgl_lite.runtime.transport.curve import ClientKeys

REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
RECEIVE_AT_ONCE = 1000  # frames taken before the thread looks at its other work

log = logging.getLogger(__name__)


def may_listen(address: str) -> bool:
    """False when surely nobody listens: no such ipc path, or one whose owner is gone. ZeroMQ would retry in silence."""
    if not address.startswith("ipc://"):
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True  # a full backlog, or what ZeroMQ will find out itself
    return True


class ClientSocket:
    """For one thread. `connected`: the ZeroMQ handshake is done, somebody is there. `gone`: they have left again.
    `refused`: they do not take our keys, or that we have none, or have none themselves.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        poller: zmq.Poller,
        keys: ClientKeys | None = None,
    ) -> None:
        self.connected = False
        self.refused = False
        self.gone = False
        self._poller = poller
        self._decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)
        self._socket = new_socket(context, zmq.DEALER)
        if keys is not None:
            keys.use(self._socket)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | REFUSALS
        self._monitor = self._socket.get_monitor_socket(events)
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(address)

    def send(self, frame: bytes) -> bool:
        """False when the socket is full; `wait_writable` then makes the poller wake for it."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait_writable(self, wanted: bool) -> None:
        self._poller.modify(self._socket, zmq.POLLIN | zmq.POLLOUT if wanted else zmq.POLLIN)

    def receive(self) -> list[ServerMessage]:
        """What has come. Sets `connected` and `gone`; once `gone`, nothing comes after these messages."""
        while not self.gone and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self.refused = self.refused or bool(event & REFUSALS)
            self.connected = self.connected or event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.gone = self.connected and event == zmq.EVENT_DISCONNECTED
        messages: list[ServerMessage] = []
        while self.gone or len(messages) < RECEIVE_AT_ONCE:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = self._decoder.decode(frame)
            except DECODE_ERRORS as error:
                log.error("dropped a bad frame of %d bytes from the engine: %s", len(frame), error)
                continue
            messages += message.chunks if isinstance(message, Chunks) else (message,)
        return messages

    def close(self, linger_ms: int = 0) -> None:
        """`linger_ms`: how long frames that were sent may still take to leave."""
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)
