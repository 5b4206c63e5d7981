"""Small differences between two ways on a noisy machine: both serve the same short parts in turns, the one without the
change twice, which shows what the machine is good for."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

PLAIN, OTHER, AGAIN = NAMES = ("plain", "other", "plain again")
RESAMPLES = 1000


def turns(number: int) -> tuple[str, ...]:
    """In which order the part of this number is served: all orders come equally often."""
    orders = list(itertools.permutations(NAMES))
    return orders[number % len(orders)]


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many times as fast the other way is, and the plain one as itself. seconds: by name, of each part.

    ratio: of a part, the geometric mean of the plain ones' times over the other's: the median, and between what that of
    95 % of the bootstrap's resamples is. total: of all parts' times.
    """
    plain, other, again = (seconds[name] for name in NAMES)
    pairs = [math.sqrt(one * two) / it for one, it, two in zip(plain, other, again, strict=True)]
    same = [one / two for one, two in zip(plain, again, strict=True)]
    return {
        "parts": len(pairs),
        "ratio": median_and_interval(pairs),
        "total": round((sum(plain) + sum(again)) / 2 / sum(other), 3),
        "plain_ratio": median_and_interval(same),
        "plain_total": round(sum(plain) / sum(again), 3),
    }


def median_and_interval(values: Sequence[float]) -> list[float]:
    """The median, and the 2.5th and 97.5th percentile of those of resamples."""
    rng = Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    bounds = medians[RESAMPLES // 40], medians[-1 - RESAMPLES // 40]
    return [round(value, 3) for value in (statistics.median(values), *bounds)]
