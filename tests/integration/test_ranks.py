"""Faults of one rank of several, under load: the right one is named, every request ends in time, nothing is left."""

from __future__ import annotations

import signal
import time

import pytest

from tests.integration.daemon import running
from tests.integration.streams import Streams, assert_dead_within

STEP_TIMEOUT_S = 2


@pytest.mark.parametrize(
    ("victim", "sent", "within", "says"),
    [
        (0, signal.SIGKILL, 2.0, "model_worker.0 was killed by SIGKILL"),
        (1, signal.SIGKILL, 2.0, "model_worker.1 was killed by SIGKILL"),
        pytest.param(
            1, signal.SIGSTOP, STEP_TIMEOUT_S + 6.0, "model_worker.1 hung and was killed: ", marks=pytest.mark.slow
        ),
    ],
)
def test_a_faulty_rank_is_named(victim: int, sent: signal.Signals, within: float, says: str) -> None:
    flags = ("--tp", "2", "--restart", "never", "--step-timeout", str(STEP_TIMEOUT_S))
    with running(*flags) as daemon, daemon.client() as client:
        streams = Streams([client], each=4)
        streams.wait_running()
        start = time.monotonic()
        daemon.children()[f"model_worker.{victim}"].send_signal(sent)
        assert_dead_within(streams, start, within)
        assert daemon.wait_exit(5) == 1
        assert daemon.log().splitlines()[-1].startswith(f"error: {says}")
        assert daemon.survivors(within=20) == []
