"""The launcher's end of the control line: ready, heartbeats and failures in; drain, abort and shutdown out."""

from __future__ import annotations

import contextlib
import logging
import os

import msgspec
import zmq

from vibe_sgl_lite.runtime.messages import ChildMessage, LauncherMessage
from vibe_sgl_lite.runtime.transport.channels import DECODE_ERRORS, bind_ipc, new_socket

log = logging.getLogger(__name__)


class ControlLine:
    """A ROUTER that children connect to under their names. For one thread, but `wake` may be called from anywhere,
    a signal handler too."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a child that starts again has its predecessor's name
        try:
            bind_ipc(self._socket, address)
        except BaseException:  # left to garbage collection, the context would wait for the open socket for ever
            self._context.destroy(linger=0)
            raise
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._decoder: msgspec.msgpack.Decoder[ChildMessage] = msgspec.msgpack.Decoder(ChildMessage)

    def wake(self) -> None:
        """End the `receive` in progress, or the next one, at once."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody waits
            os.write(self._wake_write, b"w")

    def receive(self, timeout_s: float) -> list[ChildMessage]:
        """What has come, after waiting at most `timeout_s` seconds for the first message."""
        if not self._poller.poll(max(0, int(timeout_s * 1000))):
            return []
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        messages: list[ChildMessage] = []
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                message = self._decoder.decode(frames[-1])
            except DECODE_ERRORS as error:
                log.error("dropped a bad frame on the control line: %s", error)
                continue
            if len(frames) == 2 and frames[0] == message.name.encode():
                messages.append(message)
            else:
                log.error("dropped a message on the control line that names %r falsely", message.name)

    def send(self, name: str, message: LauncherMessage) -> bool:
        """Whether the child called `name` is connected, and so got the message."""
        try:
            self._socket.send_multipart([name.encode(), msgspec.msgpack.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.destroy(linger=0)
        wake_write, self._wake_write = self._wake_write, -1  # the number may soon be another file's
        os.close(wake_write)
        os.close(self._wake_read)
