"""A client's line to the engine, sync or async: one background thread does all socket work.

So a slow consumer is not a dead one (pings go on), and any number of threads may use one connection. Every request gets
exactly one terminal event: the engine's, or one made here when the engine dies, stops answering, or forgets the
session. Repeated chunks are dropped by the index of their first token. After a loss, the next request starts a new
session. Knows nothing of prompts and outputs; what it delivers are messages and errors.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec
import zmq

from vibe_sgl_lite.runtime.client.socket_thread import ClientSocket, may_listen
from vibe_sgl_lite.runtime.errors import (
    ClosedError,
    ConnectError,
    EngineDeadError,
    ProtocolError,
    RequestError,
    VibeError,
    error_from_code,
)
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Chunk,
    ClientMessage,
    ErrorInfo,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    ServerMessage,
    Welcome,
)
from vibe_sgl_lite.runtime.settings.address import check_address

PING_S = 0.5
CONNECT_S = 1.7  # until somebody must be there: "no daemon" is said within 2 s
WELCOME_S = 10.0  # from then until the handshake is answered: a loaded machine may be slow
SILENCE_S = 4.0  # a ping unanswered for so long means that the engine hangs
CLOSE_S = 1.0  # for the last frames to leave
ID_BYTES = 4

Event = Accepted | Chunk | VibeError  # an error ends a request, as a chunk with `finish` does
QueryAnswer = QueryReply | VibeError


class _Open:
    """A request in flight. `received`: generated tokens so far, of each sample. `open`: samples that have not ended.
    `deliver` is None once its caller has left."""

    __slots__ = ("deliver", "open", "received")

    def __init__(self, deliver: Callable[[Event], None], n: int) -> None:
        self.deliver: Callable[[Event], None] | None = deliver
        self.received = [0] * n
        self.open = set(range(n))

    def tell(self, event: Event) -> None:
        if self.deliver is not None:
            self.deliver(event)


class Connection:
    """Thread-safe. Every `deliver` is called in the connection's thread and must neither block nor raise.

    address: ipc://PATH or tcp://HOST:PORT; ConfigError for another. cause: why the engine died, when the owner of the
    connection can tell (`LLM` can).
    """

    def __init__(self, address: str, cause: Callable[[], str | None] = lambda: None) -> None:
        check_address(address)
        self.address = address
        self.welcome: Welcome | None = None  # of the latest session
        self._cause = cause
        self._requests: dict[str, _Open] = {}
        self._queries: dict[int, Callable[[QueryAnswer], None]] = {}
        self._openers: list[Callable[[Welcome | VibeError], None]] = []
        self._next_qid = 0

        self._lock = threading.RLock()  # reentrant: garbage collection may run `drop` and `stop` inside `_post`
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_reader, zmq.POLLIN)
        self._line: ClientSocket | None = None
        self._in_session = False  # `Welcome` has come on this line
        self._outbox: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._connect_due = 0.0
        self._next_ping = 0.0
        self._unanswered_since: float | None = None

        self._thread = threading.Thread(target=self._run, name="vibe-sgl-lite client", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # ------------------------------------------------------------------------------------------- for any thread

    def open(self, deliver: Callable[[Welcome | VibeError], None]) -> None:
        """Start a session unless there is one, and tell of it."""
        self._post_or_raise(lambda: self._open(deliver))

    def submit(self, rid: str, frame: bytes, deliver: Callable[[Event], None], n: int = 1) -> None:
        """Send the encoded `Generate` of `rid`, which asks for n samples; each of them ends with a chunk of its own.

        An rid already in flight is answered with an error. Raises ClosedError.
        """
        self._post_or_raise(lambda: self._submit(rid, frame, deliver, n))

    def query(self, what: Literal["stats", "health", "flush_cache"], deliver: Callable[[QueryAnswer], None]) -> None:
        """Raises ClosedError."""
        self._post_or_raise(lambda: self._query(what, deliver))

    def abort(self, rid: str) -> None:
        """Ask the engine to end a request; its terminal event comes as always. Unknown rids are ignored."""
        self._post_or_raise(lambda: self._send(Abort(rid=rid)) if rid in self._requests else None)

    def drop(self, rid: str) -> None:
        """Forget a request, and have the engine end it if it still runs. No event is delivered any more."""
        self._post(lambda: self._drop(rid))

    def stop(self) -> None:
        """Begin to close, without waiting; safe inside garbage collection."""
        self._post(self._stop)

    def close(self) -> None:
        """End the session and all its requests, and wait until the thread is gone. Safe to call again."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S + 1.0)

    def _post(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if self._closing or not self._thread.is_alive():  # not alive also in the child of a fork
                return False
            self._commands.append(command)
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already
        except OSError:
            pass  # closed in between: `_end` has run the command
        return True

    def _post_or_raise(self, command: Callable[[], None]) -> None:
        if not self._post(command):
            raise ClosedError("this client is closed")

    # -------------------------------------------------------------------------------------- in the thread: the loop

    def _run(self) -> None:
        try:
            while not self._closing:
                self._poller.poll(self._timeout_ms())
                self._sleep_again()
                self._run_commands()
                if self._line is not None:
                    self._serve(self._line)
        finally:
            self._end()

    def _timeout_ms(self) -> int | None:
        if self._line is None:
            return None
        due = self._next_ping if self._in_session else self._handshake_due(self._line)
        return max(0, int((due - time.monotonic()) * 1000) + 1)

    def _handshake_due(self, line: ClientSocket) -> float:
        return self._connect_due + (WELCOME_S if line.connected else 0.0)

    def _sleep_again(self) -> None:
        with contextlib.suppress(BlockingIOError):  # something else woke the thread
            self._wake_reader.recv(4096)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _serve(self, line: ClientSocket) -> None:
        for message in line.receive():
            self._handle(message)
            if self._line is not line:
                return  # the session was refused
        now = time.monotonic()
        if line.gone:
            self._lose(EngineDeadError(self._why("the connection to the engine was lost")))
        elif self._in_session:
            self._keep_alive(now)
        elif now > self._handshake_due(line):
            self._lose(self._nobody())
        self._flush()

    def _keep_alive(self, now: float) -> None:
        # Whatever came before was read just now, so a thread that did not run for a while sees no false silence.
        if self._unanswered_since is not None and now - self._unanswered_since > SILENCE_S:
            self._lose(EngineDeadError(self._why(f"the engine has not answered for {SILENCE_S:g} s")))
        elif now >= self._next_ping:
            self._next_ping = now + PING_S
            self._send(Ping())
            if self._unanswered_since is None:
                self._unanswered_since = now

    def _end(self) -> None:
        with self._lock:
            self._closing = True  # from here on `_post` refuses
        self._run_commands()
        atexit.unregister(self.close)
        self._fail_all(ClosedError("this client was closed during the call"))
        if self._line is not None:
            if self._in_session:
                self._send(Goodbye())
                self._flush()
            self._line.close(linger_ms=int(CLOSE_S * 1000))
        self._wake_reader.close()
        self._wake_writer.close()
        self._context.term()  # returns when the last frames have left, or their linger is over

    # --------------------------------------------------------------------------------- in the thread: commands

    def _open(self, deliver: Callable[[Welcome | VibeError], None]) -> None:
        if self._in_session and self.welcome is not None:
            deliver(self.welcome)
        else:
            self._openers.append(deliver)
            self._connect()

    def _submit(self, rid: str, frame: bytes, deliver: Callable[[Event], None], n: int) -> None:
        if rid in self._requests:
            deliver(RequestError(f"rid={rid!r} is still in flight in this client; choose another", field="rid"))
            return
        self._requests[rid] = _Open(deliver, n)
        self._outbox.append(frame)
        self._connect()

    def _query(self, what: Literal["stats", "health", "flush_cache"], deliver: Callable[[QueryAnswer], None]) -> None:
        self._next_qid += 1
        self._queries[self._next_qid] = deliver
        self._send(Query(qid=self._next_qid, what=what))
        self._connect()

    def _drop(self, rid: str) -> None:
        request = self._requests.get(rid)
        if request is not None and request.deliver is not None:
            request.deliver = None  # kept until its end has come, so that a reused rid cannot get its late chunks
            self._send(Abort(rid=rid))

    def _stop(self) -> None:
        self._closing = True

    # ----------------------------------------------------------------------------------- in the thread: session

    def _connect(self) -> None:
        """Start a session unless there is one, or one is coming."""
        if self._line is not None or self._closing:
            return
        if not may_listen(self.address):
            self._lose(self._nobody())
            return
        self._line = ClientSocket(self._context, self.address, self._poller)
        self._in_session = False
        self._unanswered_since = None
        self._connect_due = time.monotonic() + CONNECT_S
        self._line.send(self._encoder.encode(Hello(protocol=PROTOCOL, client="vibe_sgl_lite")))

    def _send(self, message: ClientMessage) -> None:
        self._outbox.append(self._encoder.encode(message))

    def _flush(self) -> None:
        if self._line is None or not self._in_session:
            return
        while self._outbox and self._line.send(self._outbox[0]):
            self._outbox.popleft()
        self._line.wait_writable(bool(self._outbox))

    def _lose(self, error: VibeError) -> None:
        """The session is over: everything that waits for an answer gets this error."""
        if self._line is not None:
            self._line.close()
            self._line = None
        self._in_session = False
        self._outbox.clear()
        self._fail_all(error)

    def _fail_all(self, error: VibeError) -> None:
        openers, self._openers = self._openers, []
        queries, self._queries = self._queries, {}
        requests, self._requests = self._requests, {}
        for opener in openers:
            opener(copy.copy(error))  # each its own: an exception collects the traceback of who raises it
        for query in queries.values():
            query(copy.copy(error))
        for request in requests.values():
            request.tell(copy.copy(error))

    def _nobody(self) -> EngineDeadError:
        cause = self._cause()
        if cause is not None:
            return EngineDeadError(f"the engine died: {cause}")
        return ConnectError(
            f"no engine answers at {self.address}; start one with `python launch.py`, or pass the address that its "
            "`ready` line shows"
        )

    def _why(self, what: str) -> str:
        cause = self._cause()
        return what if cause is None else f"{what}: {cause}"

    # ---------------------------------------------------------------------------------- in the thread: messages

    def _handle(self, message: ServerMessage) -> None:
        self._unanswered_since = None
        match message:
            case Chunk():
                self._on_chunk(message)
            case Accepted():
                request = self._requests.get(message.rid)
                if request is not None:
                    request.tell(message)
            case Pong():
                pass
            case QueryReply():
                deliver = self._queries.pop(message.qid, None)
                if deliver is not None:
                    deliver(message)
            case Refused():
                self._on_refused(message)
            case Welcome():
                self.welcome = message
                self._in_session = True
                self._next_ping = 0.0
                openers, self._openers = self._openers, []
                for opener in openers:
                    opener(message)

    def _on_refused(self, message: Refused) -> None:
        info = message.error
        if message.rid is not None and info.code != ProtocolError.code:
            request = self._requests.pop(message.rid, None)
            if request is not None:
                request.tell(_exception(info))
        elif self._in_session:
            self._lose(EngineDeadError(self._why(f"the engine ended this session: {info.message}")))
        else:
            self._lose(_exception(info))

    def _on_chunk(self, chunk: Chunk) -> None:
        request = self._requests.get(chunk.rid)
        if request is None or chunk.index not in request.open:
            return  # ended, or dropped
        received = request.received[chunk.index]
        end = chunk.first + len(chunk.token_ids) // ID_BYTES
        if chunk.first < received and end <= received:
            if chunk.finish is None:
                return  # a repeat
            chunk = Chunk(chunk.rid, chunk.index, received, b"", "", chunk.finish, chunk.usage)
        elif chunk.first != received:
            what = f"request {chunk.rid}: token {chunk.first} of sample {chunk.index} came where {received} was due"
            request.tell(ProtocolError(what))
            self._drop(chunk.rid)
        request.received[chunk.index] = max(received, end)
        if chunk.finish is not None:
            request.open.remove(chunk.index)
            if not request.open:
                del self._requests[chunk.rid]
        request.tell(chunk)


def _exception(info: ErrorInfo) -> VibeError:
    return error_from_code(info.code, info.message, info.field)
