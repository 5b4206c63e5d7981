"""Chaos from the command line: random scripts until one fails, which is then shrunk and printed.

python -m tests.chaos --seconds 600 [--seed 0] [--rounds 5] [-- flags of launch.py]
python -m tests.chaos --script '[["submit", 3, 0.1], ["kill", 2, 0.2], ["settle"]]'
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from tests.chaos.driver import SETTLE, Step, draw, lab, shrink


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def written(script: Sequence[Step]) -> str:
    """As `--script` takes it."""
    return json.dumps([[step.action] if step == SETTLE else [step.action, step.pick, step.wait_s] for step in script])


def attempt(script: Sequence[Step], flags: Sequence[str]) -> str | None:
    """On a fresh engine."""
    with lab(*flags) as fresh:
        return fresh.run(script)


def explore(seed: int, rounds: int, seconds: float, flags: Sequence[str]) -> list[Step] | None:
    """Seed after seed on one engine. A script that failed, shrunk as far as it fails again on a fresh engine."""
    deadline, done = time.monotonic() + seconds, 0
    with lab(*flags) as engine:
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
        problem = attempt([*part, SETTLE], flags)
        say(f"{len(part)} steps: {problem}")
        return problem is not None

    return [*shrink(script, fails), SETTLE]


def main() -> int:
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="of a script")
    parser.add_argument("--script", help="run this one instead")
    options = parser.parse_args(words[:place])
    flags = words[place + 1 :]
    if options.script is not None:
        problem = attempt([Step(*step) for step in json.loads(options.script)], flags)
        say(problem or "as it should be")
        return int(problem is not None)
    found = explore(options.seed, options.rounds, options.seconds, flags)
    if found is not None:
        say(f"python -m tests.chaos --script '{written(found)}'")
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main())
