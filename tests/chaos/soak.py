"""Mixed traffic for a long time: the memory of no process may grow.

    python -m tests.chaos.soak --minutes 30 [--kills 0] [-- flags of launch.py]

Requests of every kind with their answers compared, some cancelled, left, unread for a while or of clients that vanish.
Prints the memory of each process of its own every minute, and at the end its slope after the first fifth, in MB an hour
(a line fitted by least squares).
kills: how many processes are killed each minute; the slope then says nothing of a process that was.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Sequence

from tests.chaos.actions import ACTIONS, DEADLY, World
from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.command import options, say
from tests.chaos.holdings import assert_idle, growth, holdings
from tests.integration.daemon import running

FLAGS = ("--dtype", "float32", "--max-total-tokens", "8192", "--max-restarts", "1000000")
CLIENTS = 4
SAMPLE_S = 10.0
SETTLED = 5  # the first so-manieth part of the time is warm-up
LIMIT = 2.0  # MB an hour
MOST_STREAMS = 16

Samples = list[tuple[float, dict[str, int]]]  # when, and the bytes of each process


def slopes(samples: Samples) -> dict[str, float]:
    """MB an hour, of each process that all samples have."""
    names = set.intersection(*(set(memory) for _, memory in samples))
    hours = [at / 3600 for at, _ in samples]
    return {
        name: statistics.linear_regression(hours, [memory[name] / 1e6 for _, memory in samples]).slope
        for name in sorted(names)
    }


def run(minutes: float, seed: int, kills: float, flags: Sequence[str]) -> None:
    """AssertionError if memory grows by more than LIMIT, or anything was lost, different or left."""
    draw = random.Random(seed)
    peaceful = [name for name in ACTIONS if name not in DEADLY and name not in ("submit", "freeze")]
    with running(*FLAGS, *flags) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(CLIENTS)]
        asks = make_asks(20, 120)
        world = World(daemon, clients, asks, undisturbed(clients[0], asks))
        assert_idle(clients[0])
        before = holdings(daemon)
        began, samples, finished = time.monotonic(), Samples(), 0
        next_sample, next_kill = 0.0, 60 / kills if kills else minutes * 120
        while (now := time.monotonic() - began) < minutes * 60:
            name = "submit" if draw.random() < 0.8 else draw.choice(peaceful)
            if now >= next_kill:
                name, next_kill = "kill", now + 60 / kills
            if name != "submit" or len(world.streams) < MOST_STREAMS:
                ACTIONS[name][1](world, draw.randrange(1000))
            for stream in world.streams:
                stream.reading.set()
                assert not stream.wrong, stream.wrong
            finished += sum(not stream.is_alive() for stream in world.streams)
            world.streams = [stream for stream in world.streams if stream.is_alive()]
            if now >= next_sample:
                next_sample = now + SAMPLE_S
                samples.append((now, {n: child.memory_full_info().uss for n, child in daemon.children().items()}))
                if len(samples) % 6 == 1:
                    memory = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in samples[-1][1].items())
                    say(f"{now / 60:.0f} min, {finished} requests, MB: {memory}")
            time.sleep(draw.uniform(0.0, 0.1))
        for stream in world.streams:
            stream.join(120)
            assert not stream.is_alive()
            assert not stream.wrong, stream.wrong
        assert_idle(clients[0])
        time.sleep(3)
        left = [text for text in growth(before, holdings(daemon)) if "MiB" not in text]
        assert not left, left
        found = slopes(samples[len(samples) // SETTLED :])
        say(f"{finished} requests in {minutes:g} minutes, none different")
        say("MB an hour: " + ", ".join(f"{name} {slope:+.2f}" for name, slope in found.items()))
        assert kills or all(slope < LIMIT for slope in found.values()), found


def main() -> None:
    asked, flags = options(__doc__, minutes=30.0, seed=0, kills=0.0)
    run(asked.minutes, asked.seed, asked.kills, flags)


if __name__ == "__main__":
    main()
