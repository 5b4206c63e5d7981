"""How long an idle engine waits for company."""

import pytest

from vibe_sgl_lite.scheduler.cost import CostModel, chunk_work
from vibe_sgl_lite.scheduler.gathering import wait_s


def cost(seconds: float) -> CostModel:
    """A model of an engine that takes so long for 100 tokens."""
    model = CostModel(16.0)
    model.observe(chunk_work(0, 100), seconds)
    return model


@pytest.mark.parametrize(("step_s", "lull_ms"), [(0.005, 1.0), (0.3, 3.0), (20.0, 5.0)])
def test_a_lull_follows_what_the_step_takes(step_s: float, lull_ms: float) -> None:
    model = cost(step_s)
    assert wait_s(model, 100, 512, 0.0) * 1e3 == pytest.approx(lull_ms, rel=0.01)
    assert wait_s(model, 100, 512, 4.5e-3 * lull_ms) * 1e3 == pytest.approx(lull_ms / 2, rel=0.05)
    assert wait_s(model, 100, 512, 5.1e-3 * lull_ms) == 0.0


def test_nothing_waits_where_the_step_is_full() -> None:
    model = cost(1.0)
    assert wait_s(model, 511, 512, 0.0) > 0.0
    assert wait_s(model, 512, 512, 0.0) == 0.0


def test_before_any_step_was_measured_a_lull_is_the_least() -> None:
    assert wait_s(CostModel(16.0), 100, 512, 0.0) == 0.001
