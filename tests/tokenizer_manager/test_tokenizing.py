"""Who is tokenized next: sessions take turns, what has ended is left out, no more at a time than there are threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from vibe_sgl_lite.tokenizer_manager.requests import OpenRequest, RequestTable
from vibe_sgl_lite.tokenizer_manager.sessions import Session
from vibe_sgl_lite.tokenizer_manager.tokenizing import TokenizingQueue


class Threads:
    """Runs nothing before it is told to."""

    def __init__(self, threads: int) -> None:
        self.running: list[tuple[Callable[[], str], Callable[[Future[str]], None]]] = []
        self.done: list[str] = []
        self.queue: TokenizingQueue[str] = TokenizingQueue(self._run, threads)
        self.table = RequestTable()

    def _run(self, work: Callable[[], str], done: Callable[[Future[str]], None]) -> None:
        self.running.append((work, done))

    def add(self, session: Session, rid: str, slow: bool = False) -> OpenRequest:
        request = self.table.add(session, rid, 1, 10)
        self.queue.add(request, lambda: rid, lambda future: self.done.append(future.result()), slow=slow)
        return request

    def finish(self, place: int = 0) -> None:
        work, done = self.running.pop(place)
        future: Future[str] = Future()
        future.set_result(work())
        done(future)

    def finish_all(self) -> list[str]:
        while self.running:
            self.finish()
        return self.done


def session(name: bytes) -> Session:
    return Session(name, "", 0.0)


def test_sessions_take_turns() -> None:
    threads = Threads(1)
    a, b, c = session(b"a"), session(b"b"), session(b"c")
    for number in range(4):
        threads.add(a, f"a{number}")
    for number in range(2):
        threads.add(b, f"b{number}")
    threads.finish()
    threads.add(c, "c0")
    assert threads.finish_all() == ["a0", "a1", "b0", "a2", "c0", "b1", "a3"]


def test_no_more_at_a_time_than_threads() -> None:
    threads = Threads(3)
    one = session(b"a")
    for number in range(10):
        threads.add(one, str(number))
    for left in range(10, 0, -1):
        assert len(threads.running) == min(3, left)
        threads.finish(-1)
    assert len(threads.done) == 10


def test_what_ended_is_not_tokenized() -> None:
    threads = Threads(1)
    a, b = session(b"a"), session(b"b")
    requests = [threads.add(a, f"a{number}") for number in range(4)]
    for number in range(2):
        threads.add(b, f"b{number}")
    threads.table.end(requests[2])
    threads.queue.drop(b.token)
    assert threads.finish_all() == ["a0", "a1", "a3"]
    threads.queue.drop(b.token)
    threads.add(b, "b3")
    assert threads.finish_all()[-1] == "b3"


def test_one_slow_one_at_a_time_and_others_pass_by() -> None:
    threads = Threads(2)
    a, b = session(b"a"), session(b"b")
    for number in range(3):
        threads.add(a, f"slow{number}", slow=True)
    for number in range(3):
        threads.add(b, f"b{number}")
    assert len(threads.running) == 2
    for _ in range(3):  # the slow one is still at work
        threads.finish(1)
    assert threads.done == ["b0", "b1", "b2"]
    assert len(threads.running) == 1
    assert threads.finish_all()[3:] == ["slow0", "slow1", "slow2"]
    threads.add(a, "quick")
    assert threads.finish_all()[-1] == "quick"
