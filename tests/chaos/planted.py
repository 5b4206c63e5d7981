"""Mistakes put into a copy of the engine, one for each promise: the suite must find each of them.

    python -m tests.chaos.planted [NAME ...]

A copy without a mistake must pass, so that what is found is the mistake. More are planted into the scheduler's core,
in tests/property/test_planted_bugs.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.__main__ import written
from tests.chaos.command import say
from tests.chaos.driver import ASKS, SETTLE, Step
from tests.integration.daemon import ROOT

EVERY_KIND = [Step("submit", number) for number in range(ASKS)]
DETOKENIZER, RANK, SCHEDULER, TOKENIZER_MANAGER = range(4)
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def killing(victim: int) -> list[str]:
    """Streams of every kind, and a process that dies under them."""
    script = written([*EVERY_KIND, Step("flow"), Step("kill", victim), SETTLE])
    return ["-m", "tests.chaos", "--patience", "60", "--script", script]


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which is there once) becomes `new`; `found_by`: arguments for python that must fail then."""

    file: str
    old: str
    new: str
    found_by: Sequence[str]


FAULTS = {
    "a request is not queued again": Fault(
        "scheduler/state.py",
        "if not request.finished and not request.queued:\n",
        "if not request.finished and not request.queued and request.seq % 4:\n",
        killing(RANK),
    ),
    "ranks are lost to an epoch that is no newer": Fault(
        "scheduler/process.py", "if epoch <= self.epoch:", "if epoch < self.epoch or not self.epoch:", killing(RANK)
    ),
    "a chunk comes twice": Fault(
        "runtime/client/in_flight.py",
        "        entry.tell(chunk)\n        return wrong",
        "        entry.tell(chunk)\n"
        "        if entry.retries and chunk.token_ids and chunk.finish is None:\n"
        "            entry.tell(chunk)\n"
        "            entry.retries = 0\n"
        "        return wrong",
        killing(TOKENIZER_MANAGER),
    ),
    "a page leaks": Fault(
        "scheduler/memory.py",
        "self._free.extend(pages)",
        "self._free.extend(page for page in pages if page % 50 != 7)",
        killing(DETOKENIZER),
    ),
    "the seed is not sent again": Fault(
        "runtime/client/in_flight.py", 'sampling["seed"] = accepted.sampling.seed', "pass", killing(TOKENIZER_MANAGER)
    ),
    "resumed text is not replayed": Fault(
        "detokenizer/core.py",
        "text = sample.add(ids, None, None)[0]",
        'text = ""',
        killing(TOKENIZER_MANAGER),
    ),
    "resumed tokens count as prompt": Fault(
        "scheduler/batch.py",
        "num_prompt_tokens=request.num_prompt_tokens,",
        "num_prompt_tokens=len(request.tokens) // 4,",
        killing(SCHEDULER),
    ),
}


def found(fault: Fault | None, command: Sequence[str]) -> tuple[bool, str]:
    """Whether the command fails on a copy with the fault (None: without one), and its last words."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
        if fault is not None:
            file = copy / fault.file
            text = file.read_text()
            assert text.count(fault.old) == 1, f"{fault.file}: {fault.old!r} is there {text.count(fault.old)} times"
            file.write_text(text.replace(fault.old, fault.new))
        done = subprocess.run(
            [sys.executable, *command],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
    return done.returncode != 0, done.stdout


def main() -> int:
    names = sys.argv[1:] or list(FAULTS)
    missed = 0
    for command in {tuple(FAULTS[name].found_by): None for name in names}:
        failed, words = found(None, command)
        assert not failed, f"without a mistake: {words}"
    for name in names:
        failed, words = found(FAULTS[name], FAULTS[name].found_by)
        missed += not failed
        say(f"{name}: {'found' if failed else 'NOT FOUND'}: {words.strip().splitlines()[-1][:200]}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
