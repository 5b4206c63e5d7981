"""Typed ZeroMQ channels between the engine's own processes.

Receivers bind, senders connect, so start-up order does not matter. PUSH blocks at its high-water mark instead of
dropping. A frame that cannot be decoded is counted and dropped: no frame can kill a process.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Generic, TypeVar

import msgspec
import zmq

T = TypeVar("T")

HIGH_WATER_MARK = 10_000  # messages; never 0 (unbounded)
LINGER_MS = 500  # how long close() waits for unsent frames
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)

log = logging.getLogger(__name__)


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket with finite linger and high-water marks."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    return socket


def bind_ipc(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind, and for ipc make the socket file private. The caller owns the folder's lock: ZeroMQ steals silently."""
    socket.bind(address)
    if address.startswith("ipc://"):
        os.chmod(address.removeprefix("ipc://"), 0o600)


class Sender:
    """The PUSH end. Not thread-safe, as ZeroMQ sockets are not."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = new_socket(context, zmq.PUSH)
        self.socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: msgspec.Struct) -> None:
        """Blocks at the high-water mark."""
        self.socket.send(self._encoder.encode(message), copy=False)

    def send_bytes(self, frame: bytes) -> None:
        self.socket.send(frame, copy=False)

    def close(self) -> None:
        self.socket.close()


class Receiver(Generic[T]):
    """The PULL end, for one union of message types. awaits_sender: whether `connected` is going to be asked."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, union: Any, *, awaits_sender: bool = False
    ) -> None:
        self.socket = new_socket(context, zmq.PULL)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) if awaits_sender else None
        bind_ipc(self.socket, address)
        self.bad_frames = 0
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def connected(self, timeout_s: float) -> bool:
        """Whether a sender is there. Senders try again every 100 to 200 ms until the receiver has bound, so one that
        was there before may be late; once connected, it needs the socket's file no longer."""
        if self._monitor is not None and self._monitor.poll(int(timeout_s * 1000)):
            self.socket.disable_monitor()
            self._monitor = None
        return self._monitor is None

    def receive(self, timeout_s: float | None) -> T | None:
        """One message; None after `timeout_s` seconds (None waits for ever, 0 does not wait) or for a bad frame."""
        if not self.socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return self._decode(self.socket.recv())

    def drain(self, most: int = 4096) -> list[T]:
        """What is there now, without waiting, at most `most` messages."""
        messages: list[T] = []
        for _ in range(most):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = self._decode(frame)
            if message is not None:
                messages.append(message)
        return messages

    def _decode(self, frame: bytes) -> T | None:
        try:
            return self._decoder.decode(frame)
        except DECODE_ERRORS as error:
            self.bad_frames += 1
            log.error("dropped a bad frame of %d bytes: %s", len(frame), error)
            return None

    def close(self) -> None:
        if self._monitor is not None:
            self.socket.disable_monitor()
        self.socket.close()
