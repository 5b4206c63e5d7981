"""Whose request is next: sessions take turns by tokens, whatever the number of requests that each has waiting.

A session is charged for what its requests have cost: the prompt tokens that were not cached, when one is admitted, and
what it has generated, when it gives its slot back. Of all sessions' next requests, by the policy's order, the one runs
that costs its session least in total: charged so far and the prompt. A session that was idle does not save up; it joins
at the charge at which the last one was admitted.

That is deficit round-robin (Shreedhar and Varghese, 1995) with a quantum of one token whose idle rounds are skipped,
or self-clocked fair queueing (Golestani, 1994); charging for output is due to VTC (Sheng et al., 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request


class FairShares:
    """What each session with live requests was charged. A request counts from `enter` to `leave`."""

    def __init__(self) -> None:
        self._live: dict[str, int] = {}
        self._charged: dict[str, int] = {}
        self._clock = 0

    def enter(self, request: Request) -> None:
        session = request.session
        if session not in self._live:
            self._live[session] = 0
            self._charged[session] = self._clock
        self._live[session] += 1

    def leave(self, request: Request) -> None:
        session = request.session
        self._live[session] -= 1
        if not self._live[session]:
            del self._live[session], self._charged[session]

    def __contains__(self, session: str) -> bool:
        """Whether it has a live request."""
        return session in self._live

    @property
    def contended(self) -> bool:
        return len(self._live) > 1

    def charge(self, request: Request, tokens: int) -> None:
        self._charged[request.session] += tokens

    def admitted(self, request: Request) -> None:
        """Call when its cached prefix is attached, and nothing else is computed."""
        self._clock = max(self._clock, self._charged[request.session])
        self.charge(request, request.num_tokens - request.num_computed_tokens)

    def order(self, requests: Iterable[Request], memory: KVMemory, *, by_priority: bool) -> Iterator[Request]:
        """The waiting `requests`, which are in the policy's order, in turns. Taken one by one: who is admitted in
        between is charged. What has run before goes on first; a higher priority, if that is the policy, too."""
        for _, level in groupby(requests, key=lambda r: r.priority if by_priority else 0):
            queues: dict[str, deque[Request]] = {}
            for request in level:
                if request.cached_tokens >= 0:
                    yield request
                else:
                    queues.setdefault(request.session, deque()).append(request)
            while queues:
                heads = ((self._total(queue[0], memory), session) for session, queue in queues.items())
                session = min(heads, key=lambda head: head[0])[1]
                yield queues[session].popleft()
                if not queues[session]:
                    del queues[session]

    def _total(self, request: Request, memory: KVMemory) -> int:
        return self._charged[request.session] + request.num_tokens - memory.cached_length(request)
