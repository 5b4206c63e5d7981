"""Prompts that wait to be tokenized: payers, as a rule sessions, take turns; what has ended meanwhile is left out.

A grammar may take long to be tried out, one after the other; so one such request at a time, and others pass by.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from vibe_sgl_lite.tokenizer_manager.requests import OpenRequest

T = TypeVar("T")
Job = tuple[OpenRequest, Callable[[], T], Callable[[Future[T]], None], bool]
Run = Callable[[Callable[[], T], Callable[[Future[T]], None]], None]


class TokenizingQueue(Generic[T]):
    """For one thread. run(work, done): run `work` elsewhere, then `done` with its future in this thread; at most
    `threads` at a time."""

    def __init__(self, run: Run[T], threads: int) -> None:
        self._run = run
        self._free = threads
        self._slow = False  # whether a slow one runs
        self._waiting: OrderedDict[str, deque[Job[T]]] = OrderedDict()  # by payer, the next to be served first

    def add(
        self, request: OpenRequest, work: Callable[[], T], done: Callable[[Future[T]], None], *, slow: bool = False
    ) -> None:
        """slow: it may take long; one of these runs at a time."""
        self._waiting.setdefault(request.payer, deque()).append((request, work, done, slow))
        self._start()

    def drop(self, session_token: str) -> None:
        """The session is over."""
        self._waiting.pop(session_token, None)

    def _start(self) -> None:
        while self._free:
            payer = next((name for name, jobs in self._waiting.items() if not (self._slow and jobs[0][3])), None)
            if payer is None:
                return
            jobs = self._waiting.pop(payer)
            request, work, done, slow = jobs.popleft()
            if jobs:
                self._waiting[payer] = jobs
            if not request.ended:
                self._free -= 1
                self._slow = self._slow or slow
                self._run(work, partial(self._finish, done, slow))

    def _finish(self, done: Callable[[Future[T]], None], slow: bool, future: Future[T]) -> None:
        self._free += 1
        self._slow = self._slow and not slow
        self._start()
        done(future)
