"""The tokenizer manager: from clients' messages to requests for the scheduler, and from text chunks back to clients.

Does no waiting and no socket work of its own: frames and the time are passed in, tokenizing is handed to threads.
Every sample gets exactly one terminal event: the detokenizer's last chunk, or one made here when the scheduler rejects
it, the client falls behind, or the engine ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET

from vibe_sgl_lite.runtime.errors import (
    DrainingError,
    EngineDeadError,
    OverloadedError,
    ProtocolError,
    RequestError,
)
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    Abort,
    AbortRequest,
    Accepted,
    AddRequest,
    Chunk,
    ChunkBatch,
    ErrorInfo,
    Finish,
    Generate,
    Goodbye,
    Hello,
    ModelInfo,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    RequestRejected,
    RoutedChunk,
    SchedulerInput,
    SchedulerQuery,
    SchedulerReply,
    TokenizerInput,
    Usage,
    Welcome,
)
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.text.grammar import FIELDS as GRAMMAR_FIELDS
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.memory import MemoryWatch
from vibe_sgl_lite.tokenizer_manager.queries import Pending, Queries, Values, health_values, no_answer
from vibe_sgl_lite.tokenizer_manager.refusals import failure, info_of, short, why_full
from vibe_sgl_lite.tokenizer_manager.requests import OpenRequest, RequestTable
from vibe_sgl_lite.tokenizer_manager.sessions import Session, Sessions
from vibe_sgl_lite.tokenizer_manager.tokenizing import Run, TokenizingQueue
from vibe_sgl_lite.tokenizer_manager.validate import (
    MAX_ECHO_CHARS,
    Limits,
    Prepared,
    Unreadable,
    check,
    prepare,
    read_frame,
)

DRAINING = ErrorInfo(DrainingError.code, "the engine is draining and takes no new requests; ask another one, or later")
ABOUT_POOL = 0  # the number of our own question to the scheduler; clients' begin at 1
THREADS = max(2, min(4, os.cpu_count() or 1))  # one may be busy with a grammar
FLUSH_PATIENCE_S = 0.5  # a client that takes nothing for so long does not hold up the end of a drain

log = logging.getLogger(__name__)


class Counters(msgspec.Struct):
    """Since the start; part of `stats`."""

    requests_total: int = 0
    requests_refused_total: int = 0
    bad_frames: int = 0
    late_chunks: int = 0
    sessions_lost_total: int = 0
    sessions_behind_total: int = 0


class TokenizerManager:
    """For one thread.

    in_thread(work, done): run `work` elsewhere, then `done` with its future in this thread; THREADS at a time.
    to_scheduler: must not block. now: monotonic seconds.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        tokenizer: ChatTokenizer,
        grammars: GrammarCompiler,
        sessions: Sessions,
        in_thread: Run[Prepared],
        to_scheduler: Callable[[SchedulerInput], None],
        now: Callable[[], float],
        memory: MemoryWatch | None = None,
    ) -> None:
        self._memory = memory or MemoryWatch()
        self.counters = Counters()
        self.requests = RequestTable()
        self._chats_are_unbounded = spec.model.generation_defaults.max_new_tokens is None
        self._spec = spec
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._sessions = sessions
        self._tokenizing = TokenizingQueue(in_thread, THREADS)
        self._to_scheduler = to_scheduler
        self._now = now
        self._limits = Limits.of(spec.context_length)
        self._most_samples = spec.args.max_running_requests + spec.args.max_queued_requests
        self._model = ModelInfo(
            spec.model_name, spec.context_length, spec.model.vocab_size, device=spec.device, dtype=spec.dtype
        )
        self._queries = Queries()
        self._pool_tokens: int | None = None  # until the scheduler has told
        self._need_pool: list[Callable[[], None]] = []  # requests that wait for it
        self._closed: ErrorInfo | None = None  # what new requests are refused with
        self._ending = False  # `Drained` is owed
        self._encoder = msgspec.msgpack.Encoder()

    # ------------------------------------------------------------------------------------------------ from clients

    def on_frame(self, identity: bytes, frame: bytes) -> None:
        """Any bytes from any connection."""
        session = self._sessions.find(identity)
        message = read_frame(frame, self._limits)
        if isinstance(message, Hello):
            self._on_hello(identity, session, message)
        elif session is None:
            self._on_stranger(identity, message)
        else:
            session.last_seen = self._now()
            self._on_message(session, message, len(frame))

    def _on_message(self, session: Session, message: Any, size: int) -> None:
        match message:
            case Generate():
                self._on_generate(session, message, size)
            case Ping(number=number):
                self._send(session, Pong(number))
            case Abort(rid=rid, fellows=fellows):
                self._on_abort(session, rid, fellows=fellows)
            case Query():
                self._on_query(session, message)
            case Goodbye():
                self._end_session(session)
            case Unreadable(error=error, rid=rid):
                self.counters.bad_frames += 1
                if rid is not None:
                    self._refuse(session, rid, info_of(error))

    def _on_hello(self, identity: bytes, session: Session | None, hello: Hello) -> None:
        if session is not None:
            self._end_session(session)  # the same connection begins anew
        if hello.protocol != PROTOCOL:
            message = (
                f"this engine speaks protocol {PROTOCOL}, not {hello.protocol}; use the client of the same version"
            )
            self._sessions.answer_stranger(identity, Refused(ErrorInfo(ProtocolError.code, message)))
        elif self._sessions.full:
            message = f"{len(self._sessions)} clients are connected, no more are taken; close some"
            self._sessions.answer_stranger(identity, Refused(ErrorInfo(OverloadedError.code, message)))
        else:
            owner = hello.pid == os.getppid()  # the launcher, in the program itself
            session = self._sessions.open(identity, hello.client[:MAX_ECHO_CHARS], self._now(), owner)
            welcome = Welcome(PROTOCOL, session.token, self._spec.epoch, self._model, self._most_samples)
            self._send(session, welcome)

    def _on_stranger(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Unreadable) and message.rid is None:
            self.counters.bad_frames += 1
        elif not isinstance(message, Goodbye):
            rid = getattr(message, "rid", None)
            error = ErrorInfo(
                ProtocolError.code,
                "there is no such session: it never began, or was silent for too long; say Hello again",
            )
            rid = None if isinstance(message, Abort) or rid is None else rid[:MAX_ECHO_CHARS]
            self._sessions.answer_stranger(identity, Refused(error, rid))

    def _on_generate(self, session: Session, message: Generate, size: int) -> None:
        self.counters.requests_total += 1
        if self._closed is not None:
            return self._refuse(session, message.rid, self._closed)
        if self.requests.find(session, message.rid) is not None:
            text = f"rid={message.rid!r:.80} is still in flight in this session; choose another"
            return self._refuse(session, message.rid, ErrorInfo(RequestError.code, text, "rid"))
        own = self.requests.load_of(message.payer or session.token)
        full = why_full(self.requests.load, own, size, self._most_samples)
        if message.resume_ids is None:  # one that goes on after a loss is no new work
            full = full or self._memory.low
        if full is not None:
            return self._refuse(session, message.rid, ErrorInfo(OverloadedError.code, f"{full}: ask later"))
        try:
            params = check(message, self._limits, self._tokenizer)
        except Exception as error:  # noqa: BLE001 - told and logged; it must not end everybody's process
            return self._refuse(session, message.rid, failure(message.rid, error))
        if message.messages is not None and params.max_new_tokens is UNSET and self._chats_are_unbounded:
            params = msgspec.structs.replace(params, max_new_tokens=None)
        n = params.n if isinstance(params.n, int) else 1
        request = self.requests.add(session, message.rid, n, size, message.payer)
        if params.max_new_tokens is None and self._pool_tokens is None:
            if not self._need_pool:
                self._to_scheduler(SchedulerQuery(ABOUT_POOL, "stats"))
            self._need_pool.append(partial(self._prepare, request, message, params))
        else:
            self._prepare(request, message, params)

    def _prepare(self, request: OpenRequest, message: Generate, params: SamplingParams) -> None:
        self._tokenizing.add(
            request,
            partial(
                prepare, message, params, self._tokenizer, self._grammars, self._spec, self._limits, self._pool_tokens
            ),
            partial(self._on_prepared, request, message),
            slow=any(getattr(message, field) is not None for field in GRAMMAR_FIELDS),
        )

    def _on_prepared(self, request: OpenRequest, message: Generate, future: Future[Prepared]) -> None:
        if request.ended or future.cancelled():
            return  # aborted, or its client is gone
        error = future.exception()
        if error is not None:
            self.requests.end(request)
            return self._refuse(request.session, request.rid, failure(request.rid, error))
        prepared = future.result()
        uid = self.requests.number(request, prepared.num_tokens, message.resume_ids)
        self._send(request.session, Accepted(request.rid, prepared.num_tokens, prepared.sampling))
        if not request.ended:  # the client was gone
            self._to_scheduler(
                AddRequest(
                    uid,
                    request.rid,
                    prepared.token_ids,
                    prepared.sampling,
                    message.priority,
                    message.cache_salt or "",
                    prepared.text_format,
                    session=request.payer,
                    timeout_s=prepared.sampling.timeout_s,
                    resume_ids=message.resume_ids,
                    streamed=message.streamed,
                )
            )

    def _on_abort(self, session: Session, rid: str, *, fellows: bool) -> None:
        sessions = [other for other in self._sessions if other.client == session.client] if fellows else [session]
        if fellows and not rid:
            requests = [request for one in sessions for request in self.requests.of_session(one)]
        else:
            requests = [request for one in sessions if (request := self.requests.find(one, rid)) is not None]
        for request in requests:
            if request.uid is not None:
                self._to_scheduler(AbortRequest(request.uid))  # which ends it with what was generated so far
            else:
                self._end_request(request, Finish("abort"))

    def _on_query(self, session: Session, query: Query) -> None:
        if self._queries.full:
            error = ErrorInfo(OverloadedError.code, "too many questions wait for the scheduler; ask later")
            self._send(session, QueryReply(query.qid, {}, error))
            return
        number = self._queries.ask(session, query.qid, query.what, self._now())
        self._to_scheduler(SchedulerQuery(number, "stats" if query.what == "health" else query.what, query.args))

    # --------------------------------------------------------------------------------------------- from the engine

    def on_engine(self, message: TokenizerInput) -> None:
        match message:
            case ChunkBatch(chunks=chunks):
                self._on_chunks(chunks)
            case RequestRejected(uid=uid, error=error):
                request = self.requests.by_uid(uid)
                if request is not None:
                    self.requests.end(request)
                    self._refuse(request.session, request.rid, error)
            case SchedulerReply(qid=qid, values=values, error=error):
                if "kv_pages_total" in values:
                    self._pool_tokens = int(values["kv_pages_total"]) * self._spec.page_size
                    waiting, self._need_pool = self._need_pool, []
                    for prepare_it in waiting:
                        prepare_it()
                pending = self._queries.answered(qid)
                if pending is not None:
                    self._answer(pending, values, error)

    def _on_chunks(self, chunks: list[RoutedChunk]) -> None:
        """What a step brought goes to each client in one message."""
        to_send: dict[Session, list[tuple[int, bytes]]] = {}
        for chunk in chunks:
            uid = chunk.uid
            request = self.requests.by_uid(uid)
            if request is None:
                self.counters.late_chunks += 1
                continue
            assert request.uid is not None
            request.tokens[uid - request.uid] = chunk.num_tokens
            if chunk.terminal:
                self.requests.end_sample(request, uid - request.uid)
            to_send.setdefault(request.session, []).append((uid, chunk.payload))
        now = self._now()
        for session, payloads in to_send.items():
            self._sessions.send_chunks(session, payloads, now)
            if session.gone:
                self._lose(session, "its connection is gone")
            elif session.outbox and session.behind(now):
                self._drop_behind(session)

    def _answer(self, pending: Pending, values: Values, error: ErrorInfo | None) -> None:
        if pending.what == "health":
            values = health_values(values, self._closed is not None) | self._memory.values()
        elif pending.what == "stats" and error is None:
            values = values | self.stats()
        self._send(pending.session, QueryReply(pending.qid, values, error))

    def stats(self) -> Values:
        """Our own part of `stats`."""
        return msgspec.structs.asdict(self.counters) | {
            "sessions": len(self._sessions),
            "sessions_total": self._sessions.opened_total,
            "requests_in_flight": len(self.requests),
            "requests_tokenizing": self.requests.num_tokenizing,
        }

    # ------------------------------------------------------------------------------------------------- time and end

    def tick(self, read_up_to: float) -> None:
        """Call it every fraction of a second. read_up_to: when there was last nothing from clients left to read."""
        now = self._now()
        self._memory.look(now)
        for session in self._sessions.flush():
            self._lose(session, "its connection is gone")
        for session in self._sessions.silent(read_up_to):
            self._lose(session, f"it was silent for {now - session.last_seen:.1f} s")
        for session in self._sessions.behind(now):
            self._drop_behind(session)
        for pending in self._queries.overdue(now):
            self._send(pending.session, no_answer(pending, self._closed is not None))

    def drain(self) -> None:
        """Refuse new requests; `drained` becomes true with the last one's end."""
        self._closed = self._closed or DRAINING
        self._ending = True

    def abort_all(self, error: ErrorInfo | None) -> None:
        """End every request now, with `error` or as aborted; then as `drain`."""
        self._closed = error or self._closed or DRAINING
        self._ending = True
        self.end_all(Finish("abort") if error is None else Finish("error", error=error))

    def end_all(self, finish: Finish) -> None:
        """End every request now; new ones are still taken."""
        self._need_pool.clear()  # whoever was asked may be gone: the next one asks anew
        for request in self.requests:
            if request.uid is not None:
                self._to_scheduler(AbortRequest(request.uid))
            self._end_request(request, finish)

    def lose_scheduler(self, error: ErrorInfo) -> None:
        """Nobody will answer what it was asked to do."""
        for pending in self._queries.take_control():
            self._send(pending.session, QueryReply(pending.qid, {}, error))

    def take_drained(self) -> bool:
        """Whether nothing is left after a `drain` or `abort_all`; true once."""
        done = self._ending and not len(self.requests) and self._sessions.all_sent(self._now(), FLUSH_PATIENCE_S)
        if done:
            self._ending = False
        return done

    def say_goodbye(self) -> None:
        """The engine ends: so do all requests and sessions."""
        self.abort_all(None)
        for session in self._sessions:
            self._send(session, Refused(ErrorInfo(EngineDeadError.code, "the engine was shut down")))

    # ------------------------------------------------------------------------------------------------------- helpers

    def _send(self, session: Session, message: Any) -> None:
        self._sessions.send(session, message, self._now())
        if session.gone:
            self._lose(session, "its connection is gone")
        elif session.hopeless():
            self._lose(session, "it takes nothing")

    def _refuse(self, session: Session, rid: str, error: ErrorInfo) -> None:
        self.counters.requests_refused_total += 1
        self._send(session, Refused(short(error), rid[:MAX_ECHO_CHARS]))

    def _end_request(self, request: OpenRequest, finish: Finish) -> None:
        """Give every open sample its terminal event ourselves; what the engine still sends for it is dropped."""
        session, uid = request.session, request.uid
        for sample in self.requests.end(request):
            tokens = request.tokens[sample]
            usage = Usage(request.prompt_tokens, tokens)
            chunk = Chunk(request.rid, sample, tokens, b"", "", finish, usage)
            if uid is None:
                self._sessions.send(session, chunk, self._now())
            else:
                self._sessions.send_chunks(session, [(uid + sample, self._encoder.encode(chunk))], self._now())

    def _end_session(self, session: Session) -> None:
        """Its client left, or is taken as gone: nobody waits for its requests any more."""
        self._sessions.close(session)
        self._tokenizing.drop(session.token)
        for request in self.requests.of_session(session):
            self.requests.end(request)
            if request.uid is not None:
                self._to_scheduler(AbortRequest(request.uid))

    def _lose(self, session: Session, why: str) -> None:
        if self._sessions.find(session.identity) is session:
            self.counters.sessions_lost_total += 1
            log.info("lost client %s (%r): %s", session.token[:8], session.client[:80], why)
            self._end_session(session)

    def _drop_behind(self, session: Session) -> None:
        """A client that does not take its text fast enough: its requests end, it is told so, it may stay."""
        requests = self.requests.of_session(session)
        if requests:
            self.counters.sessions_behind_total += 1
            log.warning("client %s lags: %d requests aborted", session.token[:8], len(requests))
        for request in requests:
            if request.uid is not None:
                self._to_scheduler(AbortRequest(request.uid))
            self._end_request(request, Finish("abort"))
