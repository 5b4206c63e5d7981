"""Ratios of what was served in turns."""

from collections import Counter
from random import Random

from benchmarks.paired import AGAIN, NAMES, OTHER, PLAIN, median_and_interval, ratios, turns


def test_all_orders_come_equally_often() -> None:
    orders = Counter(turns(number) for number in range(12))
    assert set(orders.values()) == {2}
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(NAMES))}


def test_a_small_loss_is_seen_through_noise_that_comes_and_goes() -> None:
    """3 % in parts whose times differ by three times, as all three are in the same one; and none between equals."""
    rng = Random(1)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(200):
        slow = rng.uniform(1.0, 3.0)
        for name in NAMES:
            seconds[name].append((1.03 if name == OTHER else 1.0) * slow * rng.uniform(0.95, 1.05))
    told = ratios(seconds)
    median, low, high = told["ratio"]
    assert 0.96 < low < median < high < 0.985
    assert low < 1 / 1.03 < high
    assert told["plain_ratio"][1] < 1.0 < told["plain_ratio"][2]
    assert abs(told["total"] - 1 / 1.03) < 0.01
    assert abs(told["plain_total"] - 1.0) < 0.01


def test_an_interval_is_wide_where_little_is_known() -> None:
    assert median_and_interval([2.0]) == [2.0, 2.0, 2.0]
    few, many = [1.0, 1.5, 0.5], [1.0, 1.5, 0.5] * 60
    assert median_and_interval(few) == [1.0, 0.5, 1.5]
    _, low, high = median_and_interval(many)
    assert high - low < 1.0
    assert ratios({PLAIN: [4.0], OTHER: [2.0], AGAIN: [1.0]})["ratio"][0] == 1.0
