"""Faults of one rank of several: the right one is named, and every request ends in time."""

from __future__ import annotations

import secrets
import signal
import threading
import time

import psutil
import pytest

from runtime.pipeline import Pipeline
from runtime.server_args import ServerArgs
from vibe_sgl_lite import Client, EngineDeadError, SamplingParams

LONG = SamplingParams(max_new_tokens=16_000, temperature=0, ignore_eos=True)
STEP_TIMEOUT_S = 2.0


def rank_process(rank: int) -> psutil.Process:
    return next(
        process
        for process in psutil.Process().children()
        if "model_worker.worker" in process.cmdline() and process.cmdline()[-1] == str(rank)
    )


@pytest.mark.parametrize(
    ("victim", "sent", "within", "says"),
    [
        (0, signal.SIGKILL, 2.0, "model_worker.0 was killed by SIGKILL"),
        (1, signal.SIGKILL, 2.0, "model_worker.1 was killed by SIGKILL"),
        (1, signal.SIGSTOP, STEP_TIMEOUT_S + 6.0, "model_worker.1 hung and was killed: "),
    ],
)
def test_a_faulty_rank_is_named(victim: int, sent: signal.Signals, within: float, says: str) -> None:
    name = f"ranks-{secrets.token_hex(4)}"
    engine = Pipeline(ServerArgs(name=name, tp=2, num_threads=1, step_timeout=STEP_TIMEOUT_S, log_level="error"))
    engine.start()
    children = psutil.Process().children()
    ends: list[tuple[float, str]] = []
    started = threading.Event()

    def stream(client: Client) -> None:
        try:
            for _ in client.stream("Once upon a time", LONG):
                started.set()
        except EngineDeadError as error:
            ends.append((time.monotonic(), str(error)))

    with Client(name=name) as client:
        threads = [threading.Thread(target=stream, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert started.wait(20)
        start = time.monotonic()
        rank_process(victim).send_signal(sent)
        for thread in threads:
            thread.join(within + 3)
        assert len(ends) == 4
        assert all(at - start < within for at, _ in ends)
        assert all(says in message for _, message in ends)
    assert engine.wait(5)
    assert engine.failure is not None
    assert engine.failure.startswith(says)
    assert not any(process.is_running() for process in children)
