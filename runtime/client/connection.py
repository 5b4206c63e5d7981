"""A client's line to the engine, sync or async: one background thread does all socket work.

So a slow consumer is not a dead one (pings go on), and any number of threads may use one connection. Every request gets
exactly one terminal event: the engine's, or one made here when the engine dies for good. Repeated chunks are dropped by
the index of their first token. When the session is lost while the engine lives on (a process of it starts again, or
this one did not run for a while), open requests are sent again in a new one, with what has come of them
(in_flight.py). Knows nothing of prompts and outputs; what it delivers are messages and errors.
"""

from __future__ import annotations

import atexit
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec
import zmq

from vibe_sgl_lite.runtime.client.commands import Commands
from vibe_sgl_lite.runtime.client.in_flight import Event, Window
from vibe_sgl_lite.runtime.client.requests import ClientRequest
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
    ControlArgs,
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
    What,
)
from vibe_sgl_lite.runtime.settings.address import check_address
from vibe_sgl_lite.runtime.transport.curve import ClientKeys
from vibe_sgl_lite.runtime.transport.rundir import engine_lives

PING_S = 0.5
CONNECT_S = 1.7  # until somebody must be there: "no daemon" is said within 2 s
WELCOME_S = 10.0  # from then until the handshake is answered: a loaded machine may be slow
SILENCE_S = 4.0  # a ping unanswered for so long means that the engine hangs
OWN_PAUSE_S = 1.0  # between two turns of the loop, beyond its poll: this process was stopped, or held the lock
RECONNECT_S = 30.0  # after a loss: until the engine must be there again
RETRY_S = 0.1
KEYS_WORDS = "give server_key, the engine's public key, and client_key, a pair whose public key is in its --client-keys"
CLOSE_S = 1.0  # for the last frames to leave

QueryAnswer = QueryReply | VibeError


class Connection:
    """Thread-safe. Every `deliver` is called in the connection's thread and must neither block nor raise.

    address: ipc://PATH or tcp://HOST:PORT; ConfigError for another. keys: where the engine asks for them. resume: go on
    after a loss. queue: hold requests back that are more than the engine takes; else they are sent, and its refusal
    (OverloadedError) is what comes.
    lives: whether the engine is there although nobody answers; None where nothing tells. cause: why it died, where the
    connection's owner can tell. owner: the engine is this process's own: it ends with it, so silence says nothing.
    name: what the engine is told; sessions of one name are fellows.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: ClientKeys | None = None,
        resume: bool = True,
        queue: bool = True,
        owner: bool = False,
        name: str = "vibe_sgl_lite",
        lives: Callable[[], bool | None] | None = None,
        cause: Callable[[], str | None] = lambda: None,
    ) -> None:
        check_address(address, encrypted=keys is not None)
        self._keys = keys
        self.address = address
        self.welcome: Welcome | None = None  # of the latest session
        self._resume = resume
        self._owner = owner
        self._name = name
        self._lives = partial(engine_lives, address) if lives is None else lives
        self._cause = cause
        self._window = Window(queue)
        self._queries: dict[int, Callable[[QueryAnswer], None]] = {}
        self._openers: list[Callable[[Welcome | VibeError], None]] = []
        self._next_qid = 0

        self._commands = Commands(lambda: self._thread.is_alive())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._commands.wakes, zmq.POLLIN)
        self._line: ClientSocket | None = None
        self._in_session = False  # `Welcome` has come on this line
        self._outbox: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._connect_due = 0.0
        self._next_ping = 0.0
        self._unanswered_since: float | None = None
        self._lost: tuple[float, VibeError] | None = None  # since when a session is sought again, and why
        self._retry_at = 0.0

        self._thread = threading.Thread(target=self._run, name="vibe-sgl-lite client", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # ------------------------------------------------------------------------------------------- for any thread

    def open(self, deliver: Callable[[Welcome | VibeError], None]) -> None:
        """Start a session unless there is one, and tell of it."""
        self._post_or_raise(lambda: self._open(deliver))

    def submit(self, request: ClientRequest, deliver: Callable[[Event], None], *, patient: bool = False) -> None:
        """Each sample ends with a chunk of its own, or all of them with an error.

        patient: wait until an engine that is full of others' requests takes this one. An rid already in flight is
        answered with an error. Raises ClosedError.
        """
        self._post_or_raise(lambda: self._submit(request, deliver, patient))

    def query(self, what: What, deliver: Callable[[QueryAnswer], None], args: ControlArgs | None = None) -> None:
        """Raises ClosedError."""
        self._post_or_raise(lambda: self._query(what, deliver, args or {}))

    def abort(self, rid: str) -> None:
        """Ask the engine to end a request; its terminal event comes as always. Unknown rids are ignored."""
        self._post_or_raise(lambda: self._abort(rid))

    def abort_fellows(self, rid: str) -> None:
        """As `abort`, for the requests of this rid, or with "" all, in every session of this name."""
        self._post_or_raise(lambda: self._send(Abort(rid=rid, fellows=True)))

    def drop(self, rid: str) -> None:
        """Forget a request, and have the engine end it if it still runs. No event is delivered any more."""
        self._commands.post(lambda: self._drop(rid))

    def stop(self) -> None:
        """Begin to close, without waiting; safe inside garbage collection."""
        self._commands.post(self._stop)

    def close(self) -> None:
        """End the session and all its requests, and wait until the thread is gone. Safe to call again."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S + 1.0)

    def _post_or_raise(self, command: Callable[[], None]) -> None:
        if not self._commands.post(command):
            raise ClosedError("this client is closed")

    # -------------------------------------------------------------------------------------- in the thread: the loop

    def _run(self) -> None:
        try:
            while not self._commands.closed:
                asked_ms = self._timeout_ms()
                began = time.monotonic()
                self._poller.poll(asked_ms)
                if asked_ms is not None and time.monotonic() - began > asked_ms / 1000 + OWN_PAUSE_S:
                    self._unanswered_since = None  # nobody could have answered; the next ping will tell
                self._commands.run()
                if self._line is not None:
                    self._serve(self._line)
                elif self._lost is not None and time.monotonic() >= self._retry_at:
                    self._connect()
        finally:
            self._end()

    def _timeout_ms(self) -> int | None:
        if self._line is None:
            due = None if self._lost is None else self._retry_at
        else:
            due = self._next_ping if self._in_session else self._handshake_due(self._line)
            due = min(due, self._window.retry_at or due)
        return None if due is None else max(0, int((due - time.monotonic()) * 1000) + 1)

    def _handshake_due(self, line: ClientSocket) -> float:
        return self._connect_due + (WELCOME_S if line.connected else 0.0)

    def _serve(self, line: ClientSocket) -> None:
        now = time.monotonic()  # before reading: what comes while this thread does not run is no silence
        for message in line.receive():
            self._handle(message)
            if self._line is not line:
                return  # the session was refused
        if line.gone:
            self._lose(EngineDeadError(self._why("the connection to the engine was lost")))
        elif self._in_session:
            self._keep_alive(now)
        elif line.refused:
            text = f"what listens at {self.address} is no engine, or asks for other keys: {KEYS_WORDS}"
            self._lose(ConnectError(text), final=True)
        elif now > self._handshake_due(line):
            self._lose(self._nobody())
        self._flush()

    def _keep_alive(self, now: float) -> None:
        # Whatever came before `now` has been read, so a thread that did not run for a while sees no false silence.
        since = self._unanswered_since
        if since is not None and now - since > SILENCE_S and not self._owner:
            self._lose(EngineDeadError(self._why(f"the engine has not answered for {SILENCE_S:g} s")))
        elif now >= self._next_ping:
            self._next_ping = now + PING_S
            self._send(Ping())
            if since is None:
                self._unanswered_since = now

    def _end(self) -> None:
        self._commands.close()
        atexit.unregister(self.close)
        self._fail_all(ClosedError("this client was closed during the call"))
        if self._line is not None:
            if self._in_session:
                self._send(Goodbye())
                self._flush()
            self._line.close(linger_ms=int(CLOSE_S * 1000))
        self._commands.dispose()
        # Returns when the last frames have left, or their linger is over; closes also a socket that came about by half.
        self._context.destroy(linger=int(CLOSE_S * 1000))

    # --------------------------------------------------------------------------------- in the thread: commands

    def _open(self, deliver: Callable[[Welcome | VibeError], None]) -> None:
        if self._in_session and self.welcome is not None:
            deliver(self.welcome)
        else:
            self._openers.append(deliver)
            self._connect()

    def _submit(self, request: ClientRequest, deliver: Callable[[Event], None], patient: bool) -> None:
        if request.rid in self._window:
            text = f"rid={request.rid!r} is still in flight in this client; choose another"
            deliver(RequestError(text, field="rid"))
            return
        self._window.add(request, deliver, patient)
        self._connect()
        self._flush()

    def _query(self, what: What, deliver: Callable[[QueryAnswer], None], args: ControlArgs) -> None:
        self._next_qid += 1
        self._queries[self._next_qid] = deliver
        self._send(Query(qid=self._next_qid, what=what, args=args))
        self._connect()

    def _abort(self, rid: str) -> None:
        if self._window.abort(rid):
            self._send(Abort(rid=rid))

    def _drop(self, rid: str) -> None:
        if self._window.drop(rid):
            self._send(Abort(rid=rid))

    def _stop(self) -> None:
        self._commands.closed = True

    # ----------------------------------------------------------------------------------- in the thread: session

    def _connect(self) -> None:
        """Start a session unless there is one, or one is coming."""
        if self._line is not None or self._commands.closed:
            return
        if not may_listen(self.address):
            self._lose(self._nobody())
            return
        self._line = ClientSocket(self._context, self.address, self._poller, self._keys)
        self._in_session = False
        self._unanswered_since = None
        self._connect_due = time.monotonic() + CONNECT_S
        hello = Hello(protocol=PROTOCOL, client=self._name, pid=os.getpid() if self._owner else 0)
        self._line.send(self._encoder.encode(hello))

    def _send(self, message: ClientMessage) -> None:
        self._outbox.append(self._encoder.encode(message))

    def _flush(self) -> None:
        if self._line is None or not self._in_session:
            return
        if not self._outbox:
            self._outbox.extend(self._window.due(time.monotonic()))
        while self._outbox and self._line.send(self._outbox[0]):
            self._outbox.popleft()
            if not self._outbox:
                self._outbox.extend(self._window.due(time.monotonic()))
        self._line.wait_writable(bool(self._outbox))

    def _lose(self, error: VibeError, *, final: bool = False) -> None:
        """The session is over, or none came about. Unless the engine is gone for good, open requests wait for another;
        without one, everything that waits for an answer gets this error."""
        in_session = self._in_session
        if self._line is not None:
            self._line.close()
            self._line = None
        self._in_session = False
        self._outbox.clear()
        now = time.monotonic()
        self._window.lose(error)
        lives = self._lives() if self._resume and not final and self.welcome is not None else False
        if self._lost is None and (lives or (in_session and lives is None)):
            self._lost = now, error
        if self._lost is None or lives is False or now - self._lost[0] > RECONNECT_S:
            self._fail_all(self._lost[1] if self._lost is not None else error)
        else:
            self._fail_queries(error)
            self._retry_at = now + RETRY_S
            if not self._window and not self._openers:
                self._lost = None

    def _fail_all(self, error: VibeError) -> None:
        self._lost = None
        openers, self._openers = self._openers, []
        for opener in openers:
            opener(copy.copy(error))  # each its own: an exception collects the traceback of who raises it
        self._fail_queries(error)
        self._window.fail(lambda: copy.copy(error))

    def _fail_queries(self, error: VibeError) -> None:
        queries, self._queries = self._queries, {}
        for query in queries.values():
            query(copy.copy(error))

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
                if self._window.on_chunk(message, self._resume):
                    self._send(Abort(rid=message.rid))
            case Accepted():
                self._window.on_accepted(message)
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
                self._lost = None
                self._window.set_capacity(message.capacity)
                openers, self._openers = self._openers, []
                for opener in openers:
                    opener(message)

    def _on_refused(self, message: Refused) -> None:
        info = message.error
        if message.rid is not None and info.code != ProtocolError.code:
            self._window.on_refused(message.rid, info, _exception(info), time.monotonic())
        elif self._in_session:
            # Without a session there (it was silent for too long), the engine lives; else it says that it ends.
            error = EngineDeadError(self._why(f"the engine ended this session: {info.message}"))
            self._lose(error, final=info.code != ProtocolError.code)
        else:
            self._lose(_exception(info), final=True)


def _exception(info: ErrorInfo) -> VibeError:
    return error_from_code(info.code, info.message, info.field)
