"""One client does not harm another: beside each attack a bystander's tokens stay right, and nobody waits for long.

The bounds are far above what is measured (docs/security.md), for machines that are slow and busy, and far below what
the attacks did before there were limits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from tests.integration.harm import FEW_FILES, FLAGS, PROMPT, attack
from vibe_sgl_lite import SamplingParams

GAP_S = 8.0  # the longest pause of the bystander's stream: it was 15 s and more, or the engine's end
WAIT_S = 15.0  # for a newcomer's two tokens: 23 s and more
MEMORY = 1_000 * 2**20
ANSWERS = {
    "grammars": ",".join(["json_schema"] * 3 + ["regex"] * 5),
    "slow_grammars": "done",
    "empty_lists": "16",
    "connections": "some",
    "long_prompts": "left",
    "many_prompts": "taken",
    "long_names": "short",
    "flood": "some",
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(*FLAGS, under=FEW_FILES) as daemon:
        daemon.wait_ready()
        yield daemon


@pytest.fixture(scope="module")
def undisturbed(daemon: Daemon) -> list[int]:
    with daemon.client() as client:
        return client.generate(PROMPT, SamplingParams(max_new_tokens=1000, temperature=0, ignore_eos=True)).token_ids


SLOW = ("slow_grammars", "many_prompts", "flood")  # ten seconds each


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ANSWERS])
def test_a_bystander_notices_nothing(daemon: Daemon, undisturbed: list[int], name: str) -> None:
    found = attack(daemon, name)
    assert found.answer == ANSWERS[name]
    length = min(len(undisturbed), len(found.tokens))
    assert length > 20
    assert found.tokens[:length] == undisturbed[:length]
    assert found.newcomers > 0
    assert found.longest_gap < GAP_S
    assert found.longest_wait < WAIT_S
    assert found.memory < MEMORY


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a file system without room")
def test_a_full_disk_ends_the_observers_alone(tmp_path: Path, undisturbed: list[int]) -> None:
    """--trace and --profile on a disk of 64 KB: each says so once, and the stream goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        with Daemon(*FLAGS, "--trace", str(disk / "trace"), "--profile", str(disk)) as daemon:
            daemon.wait_ready()
            params = SamplingParams(max_new_tokens=len(undisturbed), temperature=0, ignore_eos=True)
            with daemon.client() as client:
                assert client.generate(PROMPT, params).token_ids == undisturbed
                assert client.generate([PROMPT] * 8, params)[7].token_ids == undisturbed
            said = [line for line in daemon.log().splitlines() if "No space left on device" in line]
            assert 1 <= len(said) <= 5, daemon.log()  # one a file
            assert "Traceback" not in daemon.log()
            assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
