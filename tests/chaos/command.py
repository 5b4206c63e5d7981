"""What the scripts of this folder share: options, flags of launch.py behind `--`, and words on stdout."""

from __future__ import annotations

import argparse
import sys


def options(about: str | None, **defaults: int | float | str) -> tuple[argparse.Namespace, list[str]]:
    """`--NAME VALUE` for each default, and what follows `--`."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(words[:place]), words[place + 1 :]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
