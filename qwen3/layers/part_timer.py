"""The hook by which a forward tells where its time goes: every part of the work says when it begins."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Result = TypeVar("Result")
OTHER = "other"  # what no part claims: Python between the calls, mostly


class PartTimer:
    """Takes no time; the base of those that do. measures: whether they do, for what costs something to find out."""

    measures = False

    def mark(self, part: str) -> None:
        """From now on the time is that part's, until the next mark."""

    def spread(self, parts: Sequence[str], seconds: Callable[[], Iterable[float]]) -> None:
        """Since the last mark these parts have run, one after another, for so many seconds each; what is left of the
        time was OTHER's, and so is what comes."""

    def on_device(
        self, key: Hashable, work: Callable[[], Result], run: Callable[[Callable[[], Result]], Result]
    ) -> Result:
        """`run(work)`, which enqueues what `work` asks a device for: by calling it, or from what an earlier call with
        the same key has left."""
        return run(work)


NO_TIMER = PartTimer()
