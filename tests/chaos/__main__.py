"""Chaos from the command line: random scripts until one fails, which is then shrunk and printed.

python -m tests.chaos --seconds 600 [--seed 0] [--rounds 5] [-- flags of launch.py]
python -m tests.chaos --script '[["submit", 3, 0.1], ["kill", 2, 0.2], ["settle"]]'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from tests.chaos.command import options, say
from tests.chaos.driver import PATIENCE_S, SETTLE, Step, draw, lab, shrink


def written(script: Sequence[Step]) -> str:
    """As `--script` takes it."""
    return json.dumps([[step.action] if step == SETTLE else [step.action, step.pick, step.wait_s] for step in script])


def attempt(script: Sequence[Step], patience_s: float, flags: Sequence[str]) -> str | None:
    """On a fresh engine."""
    with lab(*flags, patience_s=patience_s) as fresh:
        return fresh.run(script)


def explore(seed: int, rounds: int, seconds: float, patience_s: float, flags: Sequence[str]) -> list[Step] | None:
    """Seed after seed on one engine. A script that failed, shrunk as far as it fails again on a fresh engine."""
    deadline, done = time.monotonic() + seconds, 0
    with lab(*flags, patience_s=patience_s) as engine:
        problem = None
        while problem is None and time.monotonic() < deadline:
            script = draw(seed, rounds)
            problem = engine.run(script)
            done += 1
            say(f"seed {seed}: {'as it should be' if problem is None else problem}")
            seed += 1
    if problem is None:
        return None

    def fails(part: Sequence[Step]) -> bool:
        problem = attempt([*part, SETTLE], patience_s, flags)
        say(f"{len(part)} steps: {problem}")
        return problem is not None

    return [*shrink(script, fails), SETTLE]


def main() -> int:
    asked, flags = options(__doc__, seconds=600.0, seed=0, rounds=5, patience=PATIENCE_S, script="")
    if asked.script:
        problem = attempt([Step(*step) for step in json.loads(asked.script)], asked.patience, flags)
        say(problem or "as it should be")
        return int(problem is not None)
    found = explore(asked.seed, asked.rounds, asked.seconds, asked.patience, flags)
    if found is not None:
        say(f"python -m tests.chaos --script '{written(found)}'")
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main())
