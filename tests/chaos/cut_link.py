"""Cuts the link between two nodes again and again while streams run: `python -m tests.chaos.cut_link --cuts 50`.

The nodes are two network namespaces of this machine (Linux, root, iproute2) with one cable. Prints, for each cut, how
long it lasted and how long after its end every stream had a token again; at the end, whether all answers were right.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from contextlib import ExitStack

from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.traffic import Traffic
from tests.integration.daemon import Daemon, wait_until
from tests.integration.test_nodes import cable, node_flags

FLAGS = ("--tp", "2", "--dtype", "float32", "--max-restarts", "100000", "--step-timeout", "2")
TOKENS = 200
LIMIT_S = 300.0  # until tokens come again


def wait_for_all(traffic: Traffic, since: float) -> float:
    """Seconds until every stream had a token."""
    wait_until(lambda: traffic.pauses(since, since) is not None, LIMIT_S, "tokens again")
    return time.monotonic() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a cut")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, waits = random.Random(args.seed), []
    with cable() as link, ExitStack() as stack:
        nodes = [
            stack.enter_context(
                Daemon(
                    *FLAGS, *node_flags(2, node, "10.77.0.1:29411"), under=("ip", "netns", "exec", link.spaces[node])
                )
            )
            for node in (0, 1)
        ]
        for node in nodes:
            node.wait_ready()
        client = stack.enter_context(nodes[0].client())
        asks = make_asks(args.streams, TOKENS)
        traffic = Traffic([client] * len(asks), asks, undisturbed(client, asks))
        for number in range(args.cuts):
            time.sleep(chance.uniform(0.1, 2.0))
            lasts = chance.uniform(0.05, args.longest)
            link.cut()
            time.sleep(lasts)
            link.mend()
            mended = time.monotonic()
            waits.append(wait_for_all(traffic, mended))
            sys.stdout.write(f"cut {number}: {lasts:.1f} s; all had a token {waits[-1]:.1f} s after its end\n")
            sys.stdout.flush()
            traffic.forget()
        traffic.stop(LIMIT_S)
        sys.stdout.write("".join(f"wrong: {text}\n" for text in traffic.wrong))
        sys.stdout.write(
            f"{args.cuts} cuts: {traffic.finished} requests, {len(traffic.wrong)} lost or wrong; tokens again after "
            f"{statistics.median(waits):.1f} s, at most {max(waits):.1f} s\n"
        )


if __name__ == "__main__":
    main()
