"""Which of several troubles is named as the cause, and what is none."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import cast

import pytest

from vibe_sgl_lite.runtime.launcher.boot import LOAD_FAILED
from vibe_sgl_lite.runtime.launcher.diagnosis import WatchedChild, in_trouble, likeliest_cause
from vibe_sgl_lite.runtime.launcher.spawn import ChildProcess
from vibe_sgl_lite.runtime.messages import ChildFailed


def child(name: str, code: int | None = None, words: str | None = None, *, user: bool = False) -> WatchedChild:
    """A child that is ready, with its exit code and what it said last."""
    process = SimpleNamespace(name=name, exit_code=lambda: code, exit_words=lambda: f"exited with {code}")
    watched = WatchedChild(cast(ChildProcess, process), 0.0)
    watched.facts = {}
    if words is not None:
        watched.failed, watched.failed_at = ChildFailed(name, words, user), 0.0
    return watched


KILLED, MISTAKE = child("killed", -9), child("mistake", 1, "no such\nfile", user=True)
WORDS, BARE, FINE = child("words", 1, "boom"), child("bare", 7), child("fine")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_kill_comes_before_a_mistake_before_words_before_a_bare_exit(count: int) -> None:
    by_rank = [KILLED, MISTAKE, WORDS, BARE][-count:]
    for order in permutations([*by_rank, FINE]):
        cause = likeliest_cause(order)
        assert cause.name == by_rank[0].process.name
        assert cause.users_mistake == (by_rank[0] is MISTAKE)


def test_what_it_says() -> None:
    assert likeliest_cause([MISTAKE]).text == "mistake: no such file"
    assert likeliest_cause([BARE]).text == "bare exited with 7"
    starting = child("early", LOAD_FAILED)
    starting.facts = None
    assert likeliest_cause([starting]) == (f"early exited with {LOAD_FAILED} while starting", "early", True)


def test_who_may_leave() -> None:
    gone = child("gone", 0)
    assert not in_trouble([FINE], may_leave=False)
    assert in_trouble([FINE, gone], may_leave=False)
    assert not in_trouble([FINE, gone], may_leave=True)
    assert in_trouble([FINE, child("stays", None, "I failed")], may_leave=True)
