"""10,000 requests that are aborted at random moments, beside streams that are not: these notice nothing.

    python -m tests.chaos.aborts --aborts 10000 [--seed 0] [-- flags of launch.py]

A request is cancelled by its id, left by its caller, or lost with its client, after none to many of its tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence

from tests.chaos.asks import Answer, Ask, difference, make_asks, undisturbed
from tests.chaos.command import options, say
from tests.chaos.holdings import assert_idle, growth, holdings
from tests.chaos.traffic import Traffic
from tests.integration.daemon import Daemon, running
from vibe_sgl_lite import VibeError

FLAGS = ("--dtype", "float32", "--max-total-tokens", "16384")
CALLERS = 8
TOKENS = 120
WAYS = ("cancelled", "left", "client closed")


class Caller(threading.Thread):
    """Asks and aborts, `count` times. wrong: what it was told that it should not have been."""

    def __init__(self, daemon: Daemon, pairs: Sequence[tuple[Ask, Answer]], count: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.wrong: list[str] = []
        self.aborted: Counter[str] = Counter()
        self._daemon = daemon
        self._pairs = pairs
        self._count = count
        self._draw = random.Random(seed)
        self._client = daemon.client()

    def run(self) -> None:
        for _ in range(self._count):
            ask, wanted = self._draw.choice(self._pairs)
            way = self._draw.choices(WAYS, (10, 10, 1))[0]
            try:
                answer = self._abort(ask, way)
            except VibeError as error:
                self.wrong.append(f"{way}: {type(error).__name__}: {error}")
                continue
            differs = difference(answer, wanted, whole=False)
            if differs is not None:
                self.wrong.append(f"{way}: {differs}")
            self.aborted[way] += 1
        self._client.close()

    def _abort(self, ask: Ask, way: str) -> Answer:
        """What came of the request until it was aborted, and of a cancelled one after it."""
        answer = Answer()
        until = self._draw.choice((0, 1, 2, 5, 20, TOKENS // 2))
        chunks = ask.stream(self._client)
        if until == 0:
            time.sleep(self._draw.uniform(0, 0.02))
        for chunk in itertools.chain([None], chunks):
            if chunk is not None:
                answer.add(chunk)
            if answer.num_tokens < until:
                continue
            if way == "cancelled":
                self._client.abort(chunks.rid)  # again and again: repeats mean nothing
                continue
            if way == "client closed":
                self._client.close()
                self._client = self._daemon.client()
            break
        chunks.close()
        return answer


def run(aborts: int, seed: int, flags: Sequence[str]) -> None:
    """AssertionError if anything was lost, different or left."""
    with running(*FLAGS, *flags) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(2)]
        asks = [ask for ask in make_asks(20, TOKENS) if ask.has_seed]
        answers = undisturbed(clients[0], asks)
        assert_idle(clients[0])
        before = holdings(daemon)
        bystanders = Traffic(clients, asks, answers)
        pairs = list(zip(asks, answers, strict=True))
        callers = [Caller(daemon, pairs, aborts // CALLERS, seed * CALLERS + number) for number in range(CALLERS)]
        began = time.monotonic()
        for caller in callers:
            caller.start()
        for caller in callers:
            while caller.is_alive():
                caller.join(60)
                say(f"{sum(sum(c.aborted.values()) for c in callers)} aborted after {time.monotonic() - began:.0f} s")
        bystanders.stop(120)
        wrong = bystanders.wrong + [text for caller in callers for text in caller.wrong]
        assert not wrong, wrong[:5]
        assert_idle(clients[0])
        time.sleep(3)  # for sockets of clients that have left
        grown = growth(before, holdings(daemon))
        assert not grown, grown
        assert daemon.stop() == 0
        ways = sum((caller.aborted for caller in callers), Counter[str]())
        say(f"{dict(ways)}; {bystanders.finished} requests beside them, none different; nothing left behind")


def main() -> None:
    asked, flags = options(__doc__, aborts=10_000, seed=0)
    run(asked.aborts, asked.seed, flags)


if __name__ == "__main__":
    main()
