"""Runs a script of actions against an engine and finds what it broke; draws scripts from a seed.

The oracle: every answer is that of the undisturbed run (of a request that was cancelled, its beginning), with one end a
sample; once all has ended, all pages are free or cached, and the engine holds no process, descriptor, thread, file and
not much more memory than before.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.chaos.actions import ACTIONS, DEADLY, World, flood
from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.holdings import Holdings, assert_idle, growth, holdings
from tests.integration.daemon import running, wait_until

FLAGS = (
    "--dtype",
    "float32",
    "--max-restarts",
    "1000000",
    "--max-total-tokens",
    "8192",
)  # a pool that is committed whole: its memory does not grow
CLIENTS = 3
ASKS = 11
TOKENS = 100
STEPS_A_ROUND = 16
DEATHS_A_ROUND = 2  # a request may be given up after three without a token
LONGEST_WAIT_S = 0.4
PATIENCE_S = 120.0  # for all requests of a round to end once nothing is done to it any more


@dataclass(frozen=True)
class Step:
    """wait_s: before the action. "settle": let everything end, and look."""

    action: str
    pick: int = 0
    wait_s: float = 0.0


SETTLE = Step("settle")


def draw(seed: int, rounds: int) -> list[Step]:
    """A script; the same for the same seed."""
    source = random.Random(seed)
    names, weights = list(ACTIONS), [weight for weight, _ in ACTIONS.values()]
    script = []
    for _ in range(rounds):
        deaths = 0
        for _ in range(STEPS_A_ROUND):
            name = source.choices(names, weights)[0]
            deaths += name in DEADLY
            if name not in DEADLY or deaths <= DEATHS_A_ROUND:
                script.append(Step(name, source.randrange(1000), round(source.uniform(0, LONGEST_WAIT_S), 2)))
        script.append(SETTLE)
    return script


class Lab:
    """An engine to try scripts on, with clients, requests and their answers."""

    def __init__(self, world: World, before: Holdings, patience_s: float) -> None:
        self.world = world
        self._patience_s = patience_s
        self._before = before

    def run(self, script: Sequence[Step]) -> str | None:
        """None, or the first thing that is not as it should be."""
        for step in script:
            try:
                if step == SETTLE:
                    self._settle()
                else:
                    time.sleep(step.wait_s)
                    ACTIONS[step.action][1](self.world, step.pick)
            except AssertionError as error:
                return str(error)
        return None

    def _settle(self) -> None:
        """AssertionError when something is lost, different or left."""
        world = self.world
        streams, world.streams = world.streams, []
        for stream in streams:
            stream.reading.set()
        deadline = time.monotonic() + self._patience_s
        for stream in streams:
            stream.join(max(0.0, deadline - time.monotonic()))
            assert not stream.is_alive(), f"a stream has not ended after {self._patience_s:.0f} s"
        wrong = [text for stream in streams for text in stream.wrong]
        assert not wrong, wrong[0]
        mistakes = [line for line in world.daemon.log().splitlines() if "AssertionError" in line]
        assert not mistakes, f"a mistake that was recovered from: {mistakes[0]}"
        names = self._before.descriptors.keys() - {"launcher"}
        wait_until(lambda: names <= world.daemon.children().keys(), 60, "all processes")
        assert_idle(world.clients[0])
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not growth(self._before, holdings(world.daemon)), 10, "as it was")
        grown = growth(self._before, holdings(world.daemon))
        assert not grown, f"left behind: {grown}"


@contextmanager
def lab(*flags: str, patience_s: float = PATIENCE_S) -> Iterator[Lab]:
    with running(*FLAGS, *flags) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(CLIENTS)]
        asks = make_asks(ASKS, TOKENS)
        answers = undisturbed(clients[0], asks)
        world = World(daemon, clients, asks, answers)
        flood(world, 0)  # memory that is taken once
        wait_until(lambda: _only(clients[0].stats(), CLIENTS), 60, "the flood has come and gone")
        assert_idle(clients[0])
        yield Lab(world, holdings(daemon), patience_s)


def _only(stats: Mapping[str, object], sessions: int) -> bool:
    """Others were there and have left again."""
    return stats["sessions"] == sessions and int(str(stats["sessions_total"])) > sessions


def shrink(script: Sequence[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """A shorter script that fails too, from which no single step can be left out (Zeller's ddmin, by halves)."""
    shortest, size = list(script), len(script) // 2
    while size:
        start = 0
        while start < len(shortest):
            shorter = shortest[:start] + shortest[start + size :]
            if shorter and fails(shorter):
                shortest = shorter
            else:
                start += size
        size //= 2
    return shortest
