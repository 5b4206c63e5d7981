"""Counts by powers of two, against a count of every value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vibe_sgl_lite.scheduler.histogram import BUCKETS, Histogram


@given(st.lists(st.integers(0, 2**24)))
def test_every_value_is_counted_below_its_bound_and_above_the_one_before(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    counts = [int(count) for count in histogram.counts.split(",")]
    seen = 0
    for power in range(BUCKETS - 1):
        seen += counts[power]
        assert seen == sum(value <= 2**power for value in values)
    assert (sum(counts), histogram.total) == (len(values), sum(values))
