"""The least time of a workload, against sums written out by hand."""

from __future__ import annotations

import pytest

from benchmarks.internal.roofline import Rates, Shape, least_seconds
from benchmarks.workloads import Workload

SHAPE = Shape(layer_weights=1000, head_weights=500, layers=2, heads_width=8, kv_bytes=40, element_bytes=2)


def work(*lengths: tuple[int, int]) -> Workload:
    return Workload("custom", [[0] * prompt for prompt, _ in lengths], [output for _, output in lengths])


def test_products_alone_where_reading_takes_no_time() -> None:
    # 3 + 2 - 1 tokens through the layers, 2 through the head; 1 + 2 + 3 + 4 pairs of tokens in attention.
    products = 2 * (4 * 1000 * 2 + 2 * 500) + 4 * 8 * 2 * 10
    assert least_seconds(SHAPE, work((3, 2)), Rates(1e-9, float("inf"))) == pytest.approx(products)


def test_reading_alone_where_products_take_no_time() -> None:
    # Three steps: a prompt and two tokens, each with all weights; keys and values of contexts of 3, 4 and 5.
    weights = 2 * (1000 * 2 + 500)
    assert least_seconds(SHAPE, work((3, 3)), Rates(float("inf"), 1e-9)) == pytest.approx(
        3 * weights + 40 * (3 + 4 + 5)
    )


def test_a_long_prompt_is_read_for_in_chunks_and_only_its_end_needs_the_head() -> None:
    layers, head = 2 * 1000 * 2, 2 * 500
    chunks = 2 * layers + head + 40 * (512 + 600)
    assert least_seconds(SHAPE, work((600, 1)), Rates(float("inf"), 1e-9)) == pytest.approx(chunks)


def test_requests_share_the_reading_of_weights_until_they_end() -> None:
    weights = 2 * (1000 * 2 + 500)
    # One step for both prompts, one for both requests, one for the longer one alone.
    kept = 40 * (2 + 2 + 3 + 3 + 4)
    assert least_seconds(SHAPE, work((2, 2), (2, 3)), Rates(float("inf"), 1e-9)) == pytest.approx(3 * weights + kept)


def test_what_takes_longer_counts_of_each_step() -> None:
    rates = Rates(1e-9, 1e-9)  # 1 operation and 1 byte a second
    prompt = max(2 * (100 * 2000 + 500), 2 * 2500) + max(4 * 8 * 2 * 5050, 40 * 100)
    token = max(2 * 2500, 2 * 2500) + max(4 * 8 * 2 * 101, 40 * 101)
    assert least_seconds(SHAPE, work((100, 2)), rates) == pytest.approx(prompt + token)
