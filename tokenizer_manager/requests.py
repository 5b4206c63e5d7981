"""The requests in flight: who asked, under which numbers the engine knows them, and which samples are still open.

A request ends when its last sample has had its terminal event; the table is what makes that exactly one a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vibe_sgl_lite.runtime.messages import numbers_from_now
from vibe_sgl_lite.tokenizer_manager.sessions import Session


class OpenRequest:
    """uid: None while it is being tokenized. size: bytes of its frame. tokens: generated so far, of each sample. open:
    their numbers. payer: whose turn it takes."""

    __slots__ = ("n", "open", "payer", "prompt_tokens", "rid", "session", "size", "tokens", "uid")

    def __init__(self, session: Session, rid: str, n: int, size: int, payer: str) -> None:
        self.session = session
        self.payer = payer or session.token
        self.rid = rid
        self.n = n
        self.size = size
        self.uid: int | None = None
        self.prompt_tokens = 0
        self.tokens = [0] * n
        self.open = set(range(n))

    @property
    def ended(self) -> bool:
        return not self.open


class Load:
    """What a payer, or all of them, hold. samples: that are open. waiting_bytes: of frames not tokenized yet."""

    __slots__ = ("samples", "waiting_bytes")

    def __init__(self) -> None:
        self.samples = 0
        self.waiting_bytes = 0


class RequestTable:
    """uids are never reused; sample i of a request has uid + i."""

    def __init__(self) -> None:
        self._next_uid = numbers_from_now()
        self._by_uid: dict[int, OpenRequest] = {}
        self._by_session: dict[str, dict[str, OpenRequest]] = {}  # session token -> rid -> request
        self._loads: dict[str, Load] = {}  # by payer
        self._count = 0
        self.load = Load()

    def load_of(self, payer: str) -> Load:
        return self._loads.get(payer) or Load()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[OpenRequest]:
        """All of them; they may be ended meanwhile."""
        return iter([request for requests in self._by_session.values() for request in requests.values()])

    @property
    def num_tokenizing(self) -> int:
        return sum(request.uid is None for request in self)

    def of_session(self, session: Session) -> list[OpenRequest]:
        return list(self._by_session.get(session.token, {}).values())

    def find(self, session: Session, rid: str) -> OpenRequest | None:
        return self._by_session.get(session.token, {}).get(rid)

    def by_uid(self, uid: int) -> OpenRequest | None:
        return self._by_uid.get(uid)

    def add(self, session: Session, rid: str, n: int, size: int, payer: str = "") -> OpenRequest:
        assert self.find(session, rid) is None
        request = OpenRequest(session, rid, n, size, payer)
        self._by_session.setdefault(session.token, {})[rid] = request
        self._loads.setdefault(request.payer, Load())
        self._count += 1
        self._charge(request, n, size)
        return request

    def _charge(self, request: OpenRequest, samples: int, waiting_bytes: int) -> None:
        for load in (self.load, self._loads[request.payer]):
            load.samples += samples
            load.waiting_bytes += waiting_bytes

    def number(self, request: OpenRequest, prompt_tokens: int, resume_ids: Sequence[bytes | None] | None = None) -> int:
        """Give a tokenized request its uid. resume_ids: as in `Generate`; samples that had ended end here, untold."""
        assert request.uid is None
        assert not request.ended
        request.uid, request.prompt_tokens = self._next_uid, prompt_tokens
        self._charge(request, 0, -request.size)
        self._next_uid += request.n
        for sample in range(request.n):
            self._by_uid[request.uid + sample] = request
        for sample, ids in enumerate(resume_ids or ()):
            request.tokens[sample] = len(ids or b"") // 4
            if ids is None:
                self.end_sample(request, sample)
        return request.uid

    def end_sample(self, request: OpenRequest, sample: int) -> None:
        """The request is forgotten with its last open sample."""
        request.open.remove(sample)
        self._charge(request, -1, -request.size if request.ended and request.uid is None else 0)
        if request.uid is not None:
            del self._by_uid[request.uid + sample]
        if request.ended:
            token = request.session.token
            del self._by_session[token][request.rid]
            if not self._by_session[token]:
                del self._by_session[token]
            if not self._loads[request.payer].samples:
                del self._loads[request.payer]
            self._count -= 1

    def end(self, request: OpenRequest) -> list[int]:
        """End whatever is open of a request; returns those samples."""
        samples = sorted(request.open)
        for sample in samples:
            self.end_sample(request, sample)
        return samples
