"""Frames of every length reach the ranks of other nodes whole and in order, over a real Gloo group."""

from pathlib import Path

import pytest

from tests.distributed.spawn import run_ranks
from vibe_sgl_lite.model_worker.nodes import interface_towards
from vibe_sgl_lite.runtime.errors import ConfigError


def test_frames_arrive_as_sent(tmp_path: Path) -> None:
    sent, apart, *received = run_ranks("tests.distributed.cases:relayed", 4, tmp_path)
    assert apart == []
    assert received == [sent, sent]
    assert len(set(sent)) == len(sent) - 1  # two empty ones


def test_interface_of_a_route() -> None:
    name, address = interface_towards("127.0.0.1", 29500)
    assert name in ("lo", "lo0")
    assert address == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid:1: there is no route to it"):
        interface_towards("no.such.host.invalid", 1)
