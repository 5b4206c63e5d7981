"""Prompts that wait to be tokenized: payers, as a rule sessions, take turns; what has ended meanwhile is left out."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from vibe_sgl_lite.tokenizer_manager.requests import OpenRequest

T = TypeVar("T")
Run = Callable[[Callable[[], T], Callable[[Future[T]], None]], None]


class TokenizingQueue(Generic[T]):
    """For one thread. run(work, done): run `work` elsewhere, then `done` with its future in this thread; at most
    `threads` at a time."""

    def __init__(self, run: Run[T], threads: int) -> None:
        self._run = run
        self._free = threads
        self._waiting: OrderedDict[str, deque[tuple[OpenRequest, Callable[[], T], Callable[[Future[T]], None]]]]
        self._waiting = OrderedDict()  # by payer, the next to be served first

    def add(self, request: OpenRequest, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        self._waiting.setdefault(request.payer, deque()).append((request, work, done))
        self._start()

    def drop(self, session_token: str) -> None:
        """The session is over."""
        self._waiting.pop(session_token, None)

    def _start(self) -> None:
        while self._free and self._waiting:
            payer, jobs = self._waiting.popitem(last=False)
            request, work, done = jobs.popleft()
            if jobs:
                self._waiting[payer] = jobs
            if not request.ended:
                self._free -= 1
                self._run(work, partial(self._finish, done))

    def _finish(self, done: Callable[[Future[T]], None], future: Future[T]) -> None:
        self._free += 1
        self._start()
        done(future)
