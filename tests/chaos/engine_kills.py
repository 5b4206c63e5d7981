"""Whole engines killed while they write pages to `--cache-dir`: whoever starts on what they left gives the same tokens.

    python -m tests.chaos.engine_kills --kills 200 [--seed 0] [--clients 3] [--wait 0.5] [-- flags of launch.py]

An engine that was never disturbed gives the right tokens. Then engines start on one folder, which is too small for all
prompts' pages, so that files are made and removed all the time. Under traffic, up to `wait` seconds after an engine has
stored something new, SIGKILL ends all of its processes at once, the launcher first; the next one starts on the folder.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.chaos.command import options, say
from tests.integration.daemon import Daemon, running, wait_until
from vibe_sgl_lite import Client, EngineDeadError, SamplingParams

FLAGS = ("--dtype", "float32", "--max-total-tokens", "1600")
LIMIT_GB = 0.012
ANSWER = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
STORED_S = 60.0


def make_prompts(count: int) -> list[list[int]]:
    """In groups of four that begin alike, so that pages are shared and loaded."""
    rng = random.Random(1)
    prompts = list[list[int]]()
    while len(prompts) < count:
        shared = [rng.randrange(300, 900) for _ in range(rng.randrange(100, 250))]
        prompts += [shared + [rng.randrange(300, 900) for _ in range(rng.randrange(1, 60))] for _ in range(4)]
    return prompts[:count]


def kill_all(daemon: Daemon) -> None:
    """The launcher first, so that nobody is left to tidy up."""
    launcher = psutil.Process(daemon.process.pid)
    launcher.send_signal(signal.SIGSTOP)  # else it starts others between the look and the kill
    tree = [launcher, *launcher.children(recursive=True)]
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    daemon.process.wait()
    psutil.wait_procs(tree[1:], timeout=STORED_S)


def bytes_used(folder: Path) -> int:
    """Of pages, those included that were being written."""
    sizes = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(0 if path.parent.name == "digests" else path.stat().st_size)
    return sum(sizes)


class Traffic:
    """Clients that ask for random prompts until their engine dies. wrong: (prompt, tokens) that are not as they should
    be; finished: answers in all."""

    def __init__(self, prompts: list[list[int]], right: list[list[int]], seed: int) -> None:
        self._prompts, self._right = prompts, right
        self._seed = seed
        self.wrong = list[tuple[int, list[int]]]()
        self.finished = 0

    @contextlib.contextmanager
    def over(self, daemon: Daemon, clients: int) -> Iterator[None]:
        self._seed += clients
        threads = [threading.Thread(target=self._run, args=(daemon, self._seed + number)) for number in range(clients)]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join(STORED_S)
            assert not thread.is_alive(), "a client waits for a dead engine"

    def _run(self, daemon: Daemon, seed: int) -> None:
        order = random.Random(seed)
        with contextlib.suppress(EngineDeadError), daemon.client() as client:
            while True:
                self.ask(client, order.randrange(len(self._prompts)))

    def ask(self, client: Client, number: int) -> None:
        output = client.generate(input_ids=self._prompts[number], sampling_params=ANSWER)
        if list(output.token_ids) != self._right[number]:
            self.wrong.append((number, list(output.token_ids)))
        self.finished += 1


def run(kills: int, seed: int, clients: int, wait: float, flags: Sequence[str], prompts: int = 120) -> dict[str, int]:
    """What the engines did in all. AssertionError if a token was wrong, a file damaged or the folder's bound broken."""
    draw, asked = random.Random(seed), make_prompts(prompts)
    with running(*FLAGS[:2], *flags) as daemon, daemon.client() as client:
        outputs = client.generate(input_ids=asked, sampling_params=ANSWER)
        right = [list(output.token_ids) for output in outputs]
    traffic = Traffic(asked, right, 1000 * seed)
    counts = dict.fromkeys(("disk_loaded_tokens_total", "disk_stored_tokens_total", "disk_failed_tokens_total"), 0)
    with tempfile.TemporaryDirectory() as folder:
        kept = (*FLAGS, *flags, "--cache-dir", folder, "--cache-dir-size", str(LIMIT_GB))
        for number in range(kills):
            with running(*kept) as daemon, traffic.over(daemon, clients):
                with daemon.client() as client:

                    def stored(client: Client = client) -> bool:
                        return int(client.stats()["disk_stored_tokens_total"]) > 0

                    wait_until(stored, STORED_S, "something is stored")
                    time.sleep(draw.uniform(0.0, wait))
                    stats = client.stats()
                kill_all(daemon)
            counts = {name: value + int(stats[name]) for name, value in counts.items()}
            assert not traffic.wrong, f"kill {number + 1}: {traffic.wrong}"
            assert counts["disk_failed_tokens_total"] == 0, f"kill {number + 1}: a file that could not be read"
            assert bytes_used(Path(folder)) <= LIMIT_GB * 1e9, f"kill {number + 1}: the folder is too large"
            if (number + 1) % 10 == 0:
                say(f"{number + 1} kills, {traffic.finished} answers, none wrong; {counts}")
        with running(*kept) as daemon, daemon.client() as client:
            for number in range(len(asked)):
                traffic.ask(client, number)
        assert not traffic.wrong, traffic.wrong
    say(f"{kills} kills, {traffic.finished} answers, none wrong; {counts}")
    return counts


def main() -> None:
    chosen, flags = options(__doc__, kills=200, seed=0, clients=3, wait=0.5)
    run(chosen.kills, chosen.seed, chosen.clients, chosen.wait, flags)


if __name__ == "__main__":
    main()
