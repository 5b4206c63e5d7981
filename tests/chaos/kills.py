"""Random kills over all processes while 16 clients stream: no token may differ, and nothing may be left behind.

    python -m tests.chaos.kills --kills 1000 [--seed 0] [--streams 16] [--tokens 300] [--wait 2] [-- flags of launch.py]

Kills come up to `wait` seconds after the recovery from the one before. Prints how long streams paused, by who was
killed: from the death until the last of the streams has had another token. With `--exact 0` answers may differ, as they
do in bfloat16.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Sequence

from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.command import options, say
from tests.chaos.holdings import assert_idle, growth, holdings
from tests.chaos.traffic import Traffic
from tests.integration.daemon import Daemon, running, wait_until

FLAGS = ("--dtype", "float32", "--max-restarts", "1000000")
RECOVERY_S = 120.0  # until a kill counts as not survived
SPARE = "standby"


def kill(daemon: Daemon, victim: str, traffic: Traffic) -> float:
    """Kill it; the longest pause of a stream, in seconds."""
    wait_until(lambda: victim in daemon.children(), 60, victim)
    traffic.forget()
    recoveries = daemon.log().count("serving again")
    process, killed = daemon.children()[victim], time.monotonic()
    process.kill()
    if victim.startswith(SPARE):
        return 0.0
    wait_until(lambda: daemon.log().count("serving again") > recoveries, RECOVERY_S, f"recovery from {victim}'s death")
    recovered = time.monotonic()
    wait_until(lambda: traffic.pauses(killed, recovered) is not None, RECOVERY_S, f"tokens after {victim}'s death")
    return max(traffic.pauses(killed, recovered) or ())


def table(pauses: dict[str, list[float]]) -> str:
    lines = ["| killed | times | median | 99 % | worst |", "|---|---|---|---|---|"]
    for victim, values in sorted(pauses.items()):
        ordered = sorted(values)
        near_worst = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        shown = " | ".join(f"{value:.2f} s" for value in (statistics.median(values), near_worst, ordered[-1]))
        lines.append(f"| {victim} | {len(values)} | {shown} |")
    return "\n".join(lines)


def run(
    kills: int, seed: int, streams: int, tokens: int, wait: float, flags: Sequence[str], exact: bool = True
) -> None:
    """AssertionError if anything was lost, different or left."""
    draw = random.Random(seed)
    pauses: dict[str, list[float]] = {}
    with running(*FLAGS, *flags, standby=True) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(streams)]
        asks = make_asks(2 * streams, tokens)
        answers = undisturbed(clients[0], asks)
        undisturbed(clients[0], asks)
        wait_until(lambda: any(name.startswith(SPARE) for name in daemon.children()), 60, "a spare process")
        assert_idle(clients[0])
        before = holdings(daemon)
        traffic = Traffic(clients, asks, answers)
        wait_until(lambda: all(stream.arrivals for stream in traffic.streams), 60, "streams under way")
        names = sorted(daemon.children())
        for number in range(kills):
            victim = draw.choice(names)
            pauses.setdefault(victim, []).append(kill(daemon, victim, traffic))
            wrong = traffic.wrong if exact else traffic.lost
            assert not wrong, f"kill {number + 1}, of {victim}: {wrong}"
            if (number + 1) % 25 == 0:
                say(f"{number + 1} kills, {traffic.finished} requests\n{table(pauses)}")
            time.sleep(draw.uniform(0.0, wait))
        traffic.stop(120)
        assert not (traffic.wrong if exact else traffic.lost), traffic.wrong
        different = len(traffic.different)
        say(f"{kills} kills, {traffic.finished} requests, none lost, {different} different\n{table(pauses)}")
        assert_idle(clients[0])
        time.sleep(2)
        grown = growth(before, holdings(daemon))
        assert not grown, grown
        assert daemon.stop() == 0


def main() -> None:
    asked, flags = options(__doc__, kills=1000, seed=0, streams=16, tokens=300, wait=2.0, exact=1)
    run(asked.kills, asked.seed, asked.streams, asked.tokens, asked.wait, flags, exact=bool(asked.exact))


if __name__ == "__main__":
    main()
