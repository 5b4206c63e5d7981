"""Streams that go on and on while processes are killed, each answer compared, each pause measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from tests.chaos.asks import Answer, Ask, difference
from vibe_sgl_lite import Client, VibeError


class Stream(threading.Thread):
    """One request at a time, from `asks`, each with the answer that is wanted, until these are exhausted or `stop`.

    arrivals: when tokens came. lost: requests that ended with an error, different: with another answer than was wanted.
    finished: those that ended well or so. reading: while it is not set, the caller takes nothing.
    """

    def __init__(self, client: Client, asks: Iterable[tuple[Ask, Answer]]) -> None:
        super().__init__(daemon=True)
        self.arrivals: list[float] = []
        self.lost: list[str] = []
        self.different: list[str] = []
        self.finished = 0
        self.reading = threading.Event()
        self.reading.set()
        self._client = client
        self._asks = asks
        self._stop_asked = self._cancelled = self._left = False
        self._rid: str | None = None

    def stop(self) -> None:
        """After the request that runs."""
        self._stop_asked = True

    @property
    def wrong(self) -> list[str]:
        return self.lost + self.different

    def cancel(self) -> None:
        """Have the engine end the request that runs."""
        self._cancelled = True
        if self._rid is not None:
            self._client.abort(self._rid)

    def leave(self) -> None:
        """Go away in the middle of the request that runs."""
        self._left = True

    def run(self) -> None:
        for ask, wanted in self._asks:
            answer = Answer()
            try:
                seed = self._read(ask, answer)
                if not ask.has_seed:
                    wanted = Answer()
                    self._read(ask.with_seed(seed), wanted)
                    if self._cancelled or self._left:
                        continue  # nobody knows what it should have been
            except VibeError as error:
                self.lost.append(f"{ask.params}: {type(error).__name__}: {error}")
            else:
                differs = difference(answer, wanted, whole=not (self._cancelled or self._left))
                if differs is not None:
                    self.different.append(f"{ask.params}: {differs}")
                self.finished += 1
            if self._stop_asked:
                return

    def _read(self, ask: Ask, answer: Answer) -> int:
        """Returns the seed that it ran with."""
        with ask.stream(self._client) as chunks:
            self._rid = chunks.rid
            for chunk in chunks:
                if chunk.token_ids:
                    self.arrivals.append(time.monotonic())
                answer.add(chunk)
                self.reading.wait()
                if self._cancelled:
                    self._client.abort(chunks.rid)  # it had not begun when it was cancelled
                if self._left:
                    break
            return 0 if chunks.sampling is None else int(chunks.sampling.seed)

    def pause_after(self, event: float, until: float) -> float | None:
        """Seconds without a token, the longest from `event` to the first one behind `until`; None if none has come."""
        times = [event, *(at for at in self.arrivals if at > event)]
        last = next((place for place, at in enumerate(times) if at > until), None)
        return None if last is None else max(b - a for a, b in itertools.pairwise(times[: last + 1]))


class Traffic:
    """As many streams as clients, which take turns with the asks; endlessly, or each ask once."""

    def __init__(
        self, clients: Sequence[Client], asks: Sequence[Ask], answers: Sequence[Answer], *, endless: bool = True
    ) -> None:
        pairs = list(zip(asks, answers, strict=True))
        shared = _Shared(itertools.cycle(pairs) if endless else iter(pairs))
        self.streams = [Stream(client, shared) for client in clients]
        for stream in self.streams:
            stream.start()

    @property
    def lost(self) -> list[str]:
        return [text for stream in self.streams for text in stream.lost]

    @property
    def different(self) -> list[str]:
        return [text for stream in self.streams for text in stream.different]

    @property
    def wrong(self) -> list[str]:
        return self.lost + self.different

    @property
    def finished(self) -> int:
        return sum(stream.finished for stream in self.streams)

    def pauses(self, event: float, until: float) -> list[float] | None:
        """Each stream's pause; None while one has had no token since `until`."""
        pauses = [stream.pause_after(event, until) for stream in self.streams]
        return None if None in pauses else [pause for pause in pauses if pause is not None]

    def forget(self) -> None:
        """The arrivals so far."""
        for stream in self.streams:
            del stream.arrivals[:-1]

    def stop(self, timeout: float) -> None:
        for stream in self.streams:
            stream.stop()
        self.join(timeout)

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for stream in self.streams:
            stream.join(max(0.0, deadline - time.monotonic()))
        hanging = sum(stream.is_alive() for stream in self.streams)
        assert not hanging, f"{hanging} streams have not ended after {timeout:.0f} s; wrong: {self.wrong}"


class _Shared(Iterator[tuple[Ask, Answer]]):
    """An iterator for several threads."""

    def __init__(self, items: Iterator[tuple[Ask, Answer]]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __next__(self) -> tuple[Ask, Answer]:
        with self._lock:
            return next(self._items)
