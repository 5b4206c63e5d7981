"""One client does not harm another: beside each attack a bystander's tokens stay right, and nobody waits for long.

The bounds are far above what is measured (docs/security.md), for machines that are slow and busy, and far below what
the attacks did before there were limits.
"""

from __future__ import annotations

from collections.abc import Iterator

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
