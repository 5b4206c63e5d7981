"""A small part of what `python -m tests.fuzz.model_files` does."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.model_files import make_folder, run, try_in_process, try_launch
from tests.integration.daemon import READY_S  # a busy machine: by hand, the limit is 10 s


def test_the_unchanged_folder_is_taken(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert try_in_process(tmp_path, compare=True) is None


@pytest.mark.timeout(300)
def test_mutations_are_read_right_or_refused_in_one_line() -> None:
    cases = run(1, range(150), lambda folder, number: try_in_process(folder, compare=number % 10 == 0))
    counts = Counter(refused is None for _, _, refused in cases)
    assert counts[True] > 20
    assert counts[False] > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mutations_start_or_are_refused_by_a_daemon() -> None:
    def launch(folder: Path, number: int) -> str | None:
        with tempfile.TemporaryDirectory(prefix="fl-", dir="/tmp") as base:
            return try_launch(folder, Path(base), READY_S)

    assert len(list(run(2, range(4), launch))) == 4
