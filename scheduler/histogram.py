"""Counts of whole numbers by powers of two: cheap enough for every step, small enough for an answer to `stats`."""

from __future__ import annotations

BUCKETS = 24  # up to 1, 2, 4, ... 2^22; the last is for all above


class Histogram:
    """total: the sum of what was counted."""

    def __init__(self) -> None:
        self.total = 0
        self._counts = [0] * BUCKETS

    def observe(self, value: int) -> None:
        self.total += value
        self._counts[min((value - 1).bit_length() if value > 0 else 0, BUCKETS - 1)] += 1

    @property
    def counts(self) -> str:
        """How many were at most 1, above that at most 2, above that at most 4, ..., with commas between."""
        return ",".join(map(str, self._counts))
