"""A clock that is set forward and back by hours, as an administrator or NTP may, changes no request and no deadline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.asks import difference, make_asks, undisturbed
from tests.integration.daemon import ROOT, running, wait_until
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.runtime.errors import DeadlineError

JUMPING = Path(__file__).parent / "jumping_clock"
LOOKS = "import time; print(*(time.time() for _ in range(40)))"


def test_nobody_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all processes of an engine; the rank dies once, as heartbeats and restarts are times, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(JUMPING), str(ROOT))))
    looks = [float(t) for t in subprocess.check_output([sys.executable, "-c", LOOKS], text=True).split()]
    assert max(looks) - min(looks) > 3000, "the clock does not jump"
    with running("--dtype", "float32") as daemon, daemon.client() as client:
        asks = [ask for ask in make_asks(12, 40) if ask.has_seed]
        answers = undisturbed(client, asks)
        rank = daemon.children()["model_worker.0"]
        rank.kill()
        wait_until(lambda: "serving again" in daemon.log(), 60, "the rank is there again")
        for answer, again in zip(answers, undisturbed(client, asks), strict=True):
            assert difference(again, answer, whole=True) is None
        text = client.generate("Once upon a time", SamplingParams(max_new_tokens=20, timeout_s=600.0))
        assert text.finish_reason in ("stop", "length")
        with pytest.raises(DeadlineError):
            client.generate("Once upon a time", SamplingParams(max_new_tokens=1500, ignore_eos=True, timeout_s=0.05))
