"""Client sessions on the one client-facing socket: who is there, who has gone silent, who lags.

A session is one ZeroMQ connection after its `Hello`. Nothing here waits: a frame that a client does not take now goes
to its outbox and is tried again. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from enum import Enum, auto

import msgspec
import zmq

from vibe_sgl_lite.runtime.messages import MAX_FRAME_BYTES, ServerMessage, join_chunks
from vibe_sgl_lite.runtime.transport.channels import LINGER_MS, bind_ipc, new_socket
from vibe_sgl_lite.tokenizer_manager.outbox import Outbox

MAX_SESSIONS = 4096
SILENCE_S = 2.5  # clients ping every 0.5 s
BEHIND_BYTES = 1024 * 1024  # of text chunks
HOPELESS_BYTES = 16 * 1024 * 1024  # of anything: whoever asks on and on and never reads
BEHIND_S = 10.0
FRAMES_IN_SOCKET = 512  # that ZeroMQ holds for one client, before its outbox begins
FRAMES_FROM_ONE = 16  # that ZeroMQ reads of one client ahead of us: memory for so many of the largest at most
STALL_S = 1.0  # this process did not run for longer: what that hid is no client's silence

log = logging.getLogger(__name__)


class Sent(Enum):
    YES = auto()
    FULL = auto()
    GONE = auto()


class ClientSocket:
    """The ROUTER, bound to all of `addresses`. A frame over the size limit makes ZeroMQ drop its connection.

    guard: called before a TCP address is bound, to let in nobody but those with keys.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        max_frame_bytes: int,
        *addresses: str,
        guard: Callable[[zmq.Socket[bytes]], None] = lambda socket: None,
    ) -> None:
        self.socket = new_socket(context, zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a plain ROUTER drops silently
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another one's identity
        self.socket.setsockopt(zmq.MAXMSGSIZE, max(max_frame_bytes, MAX_FRAME_BYTES))
        self.socket.setsockopt(zmq.SNDHWM, FRAMES_IN_SOCKET)
        self.socket.setsockopt(zmq.RCVHWM, FRAMES_FROM_ONE)
        for address in sorted(addresses):  # ipc first: what is bound is guarded from then on
            if address.startswith("tcp://"):
                guard(self.socket)
            bind_ipc(self.socket, address)

    @property
    def address(self) -> str:
        """The last one, as bound: port 0 is read back."""
        return str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def receive(self, most: int) -> Iterator[tuple[bytes, bytes]]:
        """(identity, frame) of what has come, without waiting, at most `most`. Several parts are no message: b""."""
        for _ in range(most):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield parts[0], parts[1] if len(parts) == 2 else b""

    def send(self, identity: bytes, frame: bytes) -> Sent:
        try:
            self.socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return Sent.FULL
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.YES

    def close(self) -> None:
        self.socket.close(linger=LINGER_MS)


class Session:
    """token: made here, what a request is tied to. gone: its connection is lost. owner: of the program that started
    this engine, which ends with it: it may be stopped for any time (Ctrl-Z, a debugger) and finds all of it there."""

    __slots__ = ("client", "gone", "identity", "last_seen", "outbox", "owner", "token")

    def __init__(self, identity: bytes, client: str, now: float, owner: bool = False) -> None:
        self.identity = identity
        self.client = client
        self.token = secrets.token_hex(16)
        self.last_seen = now
        self.outbox = Outbox()
        self.gone = False
        self.owner = owner

    def behind(self, now: float) -> bool:
        return not self.owner and (self.outbox.chunk_bytes > BEHIND_BYTES or self.outbox.age(now) > BEHIND_S)

    def hopeless(self) -> bool:
        return not self.owner and self.outbox.num_bytes > HOPELESS_BYTES


class Sessions:
    """The table of sessions. Times are monotonic seconds, passed in."""

    def __init__(self, socket: ClientSocket, now: float) -> None:
        self.opened_total = 0
        self._socket = socket
        self._by_identity: dict[bytes, Session] = {}
        self._lagging: dict[bytes, Session] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._last_look = now

    def __len__(self) -> int:
        return len(self._by_identity)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_identity.values()))

    @property
    def full(self) -> bool:
        return len(self._by_identity) >= MAX_SESSIONS

    @property
    def num_lagging(self) -> int:
        return len(self._lagging)

    def find(self, identity: bytes) -> Session | None:
        return self._by_identity.get(identity)

    def open(self, identity: bytes, client: str, now: float, owner: bool = False) -> Session:
        assert identity not in self._by_identity
        session = Session(identity, client, now, owner)
        self._by_identity[identity] = session
        self.opened_total += 1
        return session

    def close(self, session: Session) -> None:
        """Forget it, and whatever it has not taken."""
        session.gone = True
        self._by_identity.pop(session.identity, None)
        self._lagging.pop(session.identity, None)

    def send(self, session: Session, message: ServerMessage, now: float) -> None:
        """Look at `session.gone` afterwards."""
        if session.gone:
            return
        frame = self._encoder.encode(message)
        if not session.outbox:
            sent = self._socket.send(session.identity, frame)
            if sent is not Sent.FULL:
                session.gone = sent is Sent.GONE
                return
            self._lagging[session.identity] = session
        session.outbox.add(frame, now)

    def send_chunks(self, session: Session, chunks: list[tuple[int, bytes]], now: float) -> None:
        """chunks: (uid, encoded `Chunk`), all in one frame. Look at `session.gone` and `behind` afterwards."""
        if session.gone:
            return
        if not session.outbox:
            frame = chunks[0][1] if len(chunks) == 1 else join_chunks([payload for _, payload in chunks])
            sent = self._socket.send(session.identity, frame)
            if sent is not Sent.FULL:
                session.gone = sent is Sent.GONE
                return
            self._lagging[session.identity] = session
        for uid, payload in chunks:
            session.outbox.add_chunk(uid, payload, now)

    def answer_stranger(self, identity: bytes, message: ServerMessage) -> None:
        """To a connection without a session, as far as it takes it."""
        self._socket.send(identity, self._encoder.encode(message))

    def flush(self) -> list[Session]:
        """Try again what waits; returns sessions that turn out to be gone."""
        for session in list(self._lagging.values()):
            while session.outbox and not session.gone:
                sent = self._socket.send(session.identity, session.outbox.first())
                if sent is Sent.FULL:
                    break
                session.outbox.pop()
                session.gone = sent is Sent.GONE
            if session.gone or not session.outbox:
                del self._lagging[session.identity]
        return [session for session in self if session.gone]

    def behind(self, now: float) -> list[Session]:
        return [session for session in self._lagging.values() if session.behind(now)]

    def all_sent(self, now: float, patience_s: float) -> bool:
        """Whether no outbox holds anything, those aside that do not move for `patience_s`."""
        return not any(session.outbox.age(now) < patience_s for session in self._lagging.values())

    def silent(self, read_up_to: float) -> list[Session]:
        """Sessions to be given up, when there was last nothing left to read at `read_up_to`. Call it regularly."""
        pause = read_up_to - self._last_look
        self._last_look = read_up_to
        if pause > STALL_S:
            for session in self._by_identity.values():
                session.last_seen += pause
        sessions = self._by_identity.values()
        return [s for s in sessions if read_up_to - s.last_seen > SILENCE_S and not s.owner]
