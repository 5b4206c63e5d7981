"""What others notice of an attack: `python -m tests.integration.harm [NAME ...]` prints a table of it.

Beside each attack (attacks.py) two clients work: a bystander, who streams all the time, and newcomers, of whom each
asks for two tokens and leaves. What counts is the bystander's tokens and its longest gap, and the longest wait of a
newcomer. Without names, all attacks run, each on the same engine, started as for a small machine (ulimit -n 1024).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from tests.integration.attacks import ATTACKS
from tests.integration.daemon import ROOT, Daemon
from vibe_sgl_lite import SamplingParams

FEW_FILES = ("bash", "-c", 'ulimit -n 1024; exec "$@"', "bash")
FLAGS = ("--dtype", "float32")
PROMPT = "Once upon a time"
ENDLESS = SamplingParams(max_new_tokens=20_000, temperature=0, ignore_eos=True)
TWO = SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True)
PAUSE_S = 0.1  # between a newcomer's end and the next one


class Bystander(threading.Thread):
    """Streams until it is told to stop. failed: why it could not."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.longest_gap = 0.0
        self.begun = threading.Event()
        self.enough = threading.Event()
        self.failed: BaseException | None = None
        self._client = daemon.client()

    def run(self) -> None:
        try:
            with self._client:
                while not self.enough.is_set():
                    self._stream()
        except BaseException as error:  # noqa: BLE001 - told in `failed`
            self.failed = error

    def _stream(self) -> None:
        tokens: list[int] = []
        last = None
        for chunk in self._client.stream(PROMPT, ENDLESS):
            now = time.monotonic()
            if last is not None:
                self.longest_gap = max(self.longest_gap, now - last)
            last = now
            tokens += chunk.token_ids
            self.begun.set()
            if self.enough.is_set():
                break
        self.tokens = max(self.tokens, tokens, key=len)


class Newcomers(threading.Thread):
    """One after the other connects, asks for two tokens and leaves."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self.longest_wait = 0.0
        self.served = 0
        self.enough = threading.Event()
        self.failed: BaseException | None = None
        self._daemon = daemon

    def run(self) -> None:
        try:
            with self._daemon.client() as client:
                while not self.enough.wait(PAUSE_S):
                    began = time.monotonic()
                    assert len(client.generate("hi", TWO).token_ids) == 2
                    self.longest_wait = max(self.longest_wait, time.monotonic() - began)
                    self.served += 1
        except BaseException as error:  # noqa: BLE001 - told in `failed`
            self.failed = error


@dataclass(frozen=True)
class Outcome:
    """answer: what the attacker said at its end. tokens: the bystander's. longest_gap, longest_wait: seconds.
    memory: the most that the tokenizer manager had, bytes."""

    answer: str
    tokens: list[int]
    longest_gap: float
    longest_wait: float
    newcomers: int
    memory: int


def attack(daemon: Daemon, name: str, limit_s: float = 120.0) -> Outcome:
    """Run one attack in a process of its own. AssertionError when a bystander or a newcomer fails, or a process of the
    engine is another one afterwards."""
    before = daemon.children()
    manager = before["tokenizer_manager"]
    bystander, newcomers = Bystander(daemon), Newcomers(daemon)
    bystander.start()
    assert bystander.begun.wait(30)
    newcomers.start()
    command = [sys.executable, "-m", "tests.integration.attacks", name, daemon.address]
    attacker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    most, deadline = 0, time.monotonic() + limit_s
    while attacker.poll() is None and time.monotonic() < deadline:
        most = max(most, int(manager.memory_info().rss))
        time.sleep(0.02)
    attacker.kill()
    answer, _ = attacker.communicate(timeout=30)
    served = newcomers.served  # who comes now waits for nothing that was left behind
    while newcomers.served == served and newcomers.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    for thread in (newcomers, bystander):
        thread.enough.set()
        thread.join(60)
        assert thread.failed is None, thread.failed
        assert not thread.is_alive()
    after = daemon.children()  # a spare process may have been added
    assert all(after.get(name) == child for name, child in before.items()), f"{before} became {after}"
    return Outcome(answer, bystander.tokens, bystander.longest_gap, newcomers.longest_wait, newcomers.served, most)


def main(names: list[str]) -> None:
    sys.stdout.write("| attack | answer | bystander's longest gap, s | newcomer's longest wait, s | memory, MiB |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    with Daemon(*FLAGS, under=FEW_FILES) as daemon:
        daemon.wait_ready()
        for name in names or ATTACKS:
            found = attack(daemon, name)
            numbers = f"{found.longest_gap:.2f} | {found.longest_wait:.2f} | {found.memory >> 20}"
            sys.stdout.write(f"| {name} | {found.answer} | {numbers} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
