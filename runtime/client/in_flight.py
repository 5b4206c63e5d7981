"""The requests of one connection: which may be sent, what has come of each, and what to send again after a loss.

A window keeps the engine from being overrun: it counts samples, knows from the handshake how many the engine takes, and
holds the rest back here. Knows nothing of sockets and sessions; for one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from vibe_sgl_lite.runtime.client.requests import ClientRequest
from vibe_sgl_lite.runtime.errors import EngineLostError, OverloadedError, ProtocolError, VibeError
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, ErrorInfo, Finish, encode_request

MAX_RETRIES = 3  # of a request, by losses in a row, without a token gained in between
PATIENCE_S = 0.25  # until a request that an engine full of others' requests refused is sent again
ID_BYTES = 4

Event = Accepted | Chunk | VibeError  # an error ends a request, as a chunk with `finish` does


class InFlightRequest:
    """A request that has not ended. ids: the generated tokens that have come, int32, of each sample. open: samples that
    have not ended; lost: those of them that ended with the process that knew them. deliver: None once its caller left.
    """

    __slots__ = ("accepted", "deliver", "gained", "ids", "lost", "open", "patient", "request", "retries", "sent")

    def __init__(self, request: ClientRequest, deliver: Callable[[Event], None], patient: bool) -> None:
        self.request = request
        self.deliver: Callable[[Event], None] | None = deliver
        self.patient = patient
        self.ids = [bytearray() for _ in range(request.n)]
        self.open = set(range(request.n))
        self.lost: set[int] = set()
        self.accepted: Accepted | None = None
        self.sent = False
        self.retries = 0
        self.gained = False

    def tell(self, event: Event) -> None:
        if self.deliver is not None:
            self.deliver(event)

    def frame(self) -> bytes:
        """What is to be sent: with what has come of it, where it is not sent for the first time."""
        message, accepted = self.request.message, self.accepted
        if accepted is None:
            return self.request.frame
        sampling = msgspec.msgpack.decode(message.sampling)
        sampling["seed"] = accepted.sampling.seed
        if all(self.ids[index] for index in self.open):
            sampling.pop("prompt_logprobs", None)  # they have come with the first tokens
        resume = [bytes(ids) if index in self.open else None for index, ids in enumerate(self.ids)]
        return encode_request(
            msgspec.structs.replace(
                message,
                sampling=msgspec.Raw(msgspec.msgpack.encode(sampling)),
                resume_ids=resume if any(self.ids) else None,
            )
        )


class Window:
    """The requests of one connection, by rid. capacity: samples that the engine takes at once; None holds nothing back.

    The limit falls below the capacity while the engine, full of others' requests, refuses ours, and rises with every
    sample that ends.
    """

    def __init__(self, queue: bool) -> None:
        self.retry_at: float | None = None
        self._queue = queue
        self._requests: dict[str, InFlightRequest] = {}
        self._waiting: deque[InFlightRequest] = deque()
        self._refused: list[InFlightRequest] = []  # to be sent at `retry_at`, and hold nobody up
        self._in_flight = 0  # samples
        self._capacity = self._limit = 1 << 62

    def __contains__(self, rid: str) -> bool:
        return rid in self._requests

    def __bool__(self) -> bool:
        return bool(self._requests)

    def set_capacity(self, capacity: int) -> None:
        if self._queue and capacity:
            self._capacity = self._limit = capacity

    def add(self, request: ClientRequest, deliver: Callable[[Event], None], patient: bool) -> None:
        """patient: the caller rather waits than hear that the engine is full."""
        self._requests[request.rid] = entry = InFlightRequest(request, deliver, patient)
        self._waiting.append(entry)

    def due(self, now: float) -> Iterator[bytes]:
        """The frames that may be sent now."""
        if self.retry_at is not None and now >= self.retry_at:
            self._end_patience()
        while self._waiting:
            entry = self._waiting[0]
            if entry.open:
                alone = not self._in_flight and self.retry_at is None
                if not alone and self._in_flight + len(entry.open) > self._limit:
                    return
                entry.sent = True
                self._in_flight += len(entry.open)
                yield entry.frame()
            self._waiting.popleft()

    def drop(self, rid: str) -> bool:
        """Its caller has left; returns whether the engine has to be told. It is kept until its end has come, so that a
        reused rid cannot get its late chunks."""
        entry = self._requests.get(rid)
        if entry is None or entry.deliver is None:
            return False
        entry.deliver = None
        if not entry.sent:
            self._forget(entry)
        return entry.sent

    def abort(self, rid: str) -> bool:
        """Returns whether the engine has to be told; a request that is held back ends here."""
        entry = self._requests.get(rid)
        if entry is None or entry.sent:
            return entry is not None
        chunks = [
            Chunk(rid, index, len(entry.ids[index]) // ID_BYTES, b"", "", Finish("abort"))
            for index in sorted(entry.open)
        ]
        self._forget(entry)
        for chunk in chunks:
            entry.tell(chunk)
        return False

    def on_accepted(self, message: Accepted) -> None:
        entry = self._requests.get(message.rid)
        if entry is not None and entry.accepted is None:
            entry.accepted = message
            entry.tell(message)

    def on_refused(self, rid: str, info: ErrorInfo, error: VibeError, now: float) -> None:
        """A refused request is over, unless the engine was only full, and its caller rather waits or it had run there
        before a loss: others may have taken its place."""
        entry = self._requests.get(rid)
        if entry is None or not entry.sent:
            return
        self._land(entry)
        waits = entry.retries > 0 or (self._queue and (entry.patient or self._in_flight > 0))
        if info.code == OverloadedError.code and waits:
            self.retry_at = now + PATIENCE_S
            if not any(entry.ids) and not entry.retries:
                entry.accepted = None  # it gets another seed
            if self._queue:
                self._limit = self._in_flight
                self._waiting.appendleft(entry)
            else:
                self._refused.append(entry)
            return
        self._forget(entry)
        entry.tell(error)

    def on_chunk(self, chunk: Chunk, resume: bool) -> bool:
        """Returns whether the request makes no sense any more and the engine has to end it.

        resume: a sample that was lost with a process of the engine goes on.
        """
        entry = self._requests.get(chunk.rid)
        if entry is None or not entry.sent or chunk.index not in entry.open - entry.lost:
            return False  # ended, or dropped
        if resume and entry.deliver is not None and _lost(chunk):
            entry.lost.add(chunk.index)
            if entry.lost == entry.open:
                self._requeue(entry, EngineLostError(chunk.finish.error.message))  # type: ignore[union-attr]
            return False
        ids = entry.ids[chunk.index]
        received = len(ids) // ID_BYTES
        end = chunk.first + len(chunk.token_ids) // ID_BYTES
        wrong = False
        if chunk.first < received and end <= received:
            if chunk.finish is None:
                return False  # a repeat
            chunk = Chunk(chunk.rid, chunk.index, received, b"", "", chunk.finish, chunk.usage)
        elif chunk.first != received:
            what = f"request {chunk.rid}: token {chunk.first} of sample {chunk.index} came where {received} was due"
            entry.tell(ProtocolError(what))
            entry.deliver, wrong = None, True
        entry.gained = entry.gained or bool(chunk.token_ids)
        ids += chunk.token_ids
        if chunk.finish is not None:
            entry.open.remove(chunk.index)
            self._in_flight -= 1
            self._limit = min(self._capacity, self._limit + 1)
            if not entry.open:
                del self._requests[chunk.rid]
        entry.tell(chunk)
        return wrong

    def lose(self, error: VibeError) -> None:
        """The session is over: what was sent is to be sent again, unless that was in vain too often."""
        self._end_patience()
        for entry in reversed([entry for entry in self._requests.values() if entry.sent]):
            if entry.deliver is None:
                self._land(entry)
                self._forget(entry)
            else:
                self._requeue(entry, error)

    def fail(self, error: Callable[[], VibeError]) -> None:
        """Everything is over."""
        entries, self._requests = list(self._requests.values()), {}
        self._waiting.clear()
        self._refused.clear()
        self._in_flight = 0
        for entry in entries:
            entry.tell(error())

    def _end_patience(self) -> None:
        self.retry_at = None
        self._waiting.extendleft(reversed(self._refused))
        self._refused.clear()

    def _requeue(self, entry: InFlightRequest, error: VibeError) -> None:
        self._land(entry)
        entry.retries = 1 if entry.gained else entry.retries + 1
        entry.gained = False
        if entry.retries > MAX_RETRIES:
            self._forget(entry)
            entry.tell(error)
        else:
            self._waiting.appendleft(entry)

    def _land(self, entry: InFlightRequest) -> None:
        """It is not in flight any more."""
        assert entry.sent
        entry.sent = False
        entry.lost.clear()
        self._in_flight -= len(entry.open)

    def _forget(self, entry: InFlightRequest) -> None:
        """For an entry that is not in flight; it may be in the queue."""
        del self._requests[entry.request.rid]
        entry.open.clear()


def _lost(chunk: Chunk) -> bool:
    error = None if chunk.finish is None else chunk.finish.error
    return error is not None and error.code == EngineLostError.code
