"""One client does not harm another: beside each attack a bystander's tokens stay right, its stream does not pause."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.integration.daemon import ROOT, Daemon
from vibe_sgl_lite import SamplingParams

GAP_S = 1.0  # the longest pause of the bystander's stream
TOKENS = 20_000
PARAMS = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
PROMPT = "Once upon a time"
ANSWERS = {
    "grammars": ",".join(["json_schema"] * 3 + ["regex"] * 5),
    "empty_lists": "16",
    "connections": "some",
    "long_prompts": "left",
    "long_names": "short",
}


class Bystander(threading.Thread):
    """Streams until it is told to stop."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.longest_gap = 0.0
        self.begun = threading.Event()
        self.enough = threading.Event()
        self._client = daemon.client()

    def run(self) -> None:
        last = None
        with self._client:
            for chunk in self._client.stream(PROMPT, PARAMS):
                now = time.monotonic()
                if last is not None:
                    self.longest_gap = max(self.longest_gap, now - last)
                last = now
                self.tokens += chunk.token_ids
                self.begun.set()
                if self.enough.is_set():
                    break


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    few = ("bash", "-c", 'ulimit -n 1024; exec "$@"', "bash")
    with Daemon("--dtype", "float32", under=few) as daemon:
        daemon.wait_ready()
        yield daemon


@pytest.fixture(scope="module")
def undisturbed(daemon: Daemon) -> list[int]:
    with daemon.client() as client:
        return client.generate(PROMPT, SamplingParams(max_new_tokens=3000, temperature=0, ignore_eos=True)).token_ids


@pytest.mark.parametrize("name", ANSWERS)
def test_a_bystander_notices_nothing(daemon: Daemon, undisturbed: list[int], name: str) -> None:
    manager = daemon.children()["tokenizer_manager"]
    bystander = Bystander(daemon)
    bystander.start()
    assert bystander.begun.wait(20)
    command = [sys.executable, "-m", "tests.integration.attacks", name, daemon.address]
    attack = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    most = 0
    while attack.poll() is None and bystander.is_alive():
        most = max(most, memory(manager))
        time.sleep(0.02)
    answer, _ = attack.communicate(timeout=60)
    with daemon.client() as other:  # who comes now waits for nothing that is left behind
        began = time.monotonic()
        assert other.generate("hi", SamplingParams(max_new_tokens=2, temperature=0)).token_ids
        assert time.monotonic() - began < 2 * GAP_S
    bystander.enough.set()
    bystander.join(20)
    assert answer == ANSWERS[name]
    length = min(len(undisturbed), len(bystander.tokens))
    assert length > 50
    assert bystander.tokens[:length] == undisturbed[:length]
    assert bystander.longest_gap < GAP_S
    assert most < 1_200 * 2**20
    assert {child.pid for child in daemon.children().values()} >= {manager.pid}


def memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)
