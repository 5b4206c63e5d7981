"""Pages on the disk: random runs against ranks that notice every wrong page, and the rules one by one."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.scheduler.fake_folder import FakeFolder
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.messages import PageMoves
from vibe_sgl_lite.scheduler.disk_tier import DiskTier
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import RadixNode
from vibe_sgl_lite.scheduler.request import Request

PAGE = 4
RUNS = int(os.environ.get("DISK_TIER_RUNS", "25"))
STORY, OTHER = list(range(40)), [7, 7, 7, *list(range(30))]


def run_at_random(seed: int, rules: int = 60) -> dict[str, int]:
    """Prompts that share beginnings, a small pool, and whatever may happen to ranks, files and cache."""
    rng = random.Random(seed)
    folder = FakeFolder(rng, rng.choice([3, 12, 60]), rng.choice([1, 2]), rng.choice([0, 0.2, 0.5]))
    harness = Harness(config(num_pages=rng.choice([14, 40]), max_running_requests=3), folder=folder, seed=seed)
    for uid in range(rules):
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                head = rng.choice([STORY, OTHER])[: rng.randint(1, 40)]
                harness.add(request(uid, head, salt=rng.choice(["", "", "a"]), max_new_tokens=rng.randint(1, 6)))
            case 4 | 5 | 6:
                for _ in range(rng.randrange(20)):
                    harness.step()
            case 7:
                harness.scheduler.state.memory.cache.evict(rng.randint(1, 40))
            case 8:
                harness.lose_ranks()
                harness.ranks_ready()
            case 9 if rng.random() < 0.3:
                folder.lose_some()
            case 9:
                freed = harness.scheduler.flush_cache(harness.now)
                assert freed is None or harness.scheduler.stats()["disk_pages"] == 0
                harness.expire(harness.now + rng.choice([0, 0, 10]))
        harness.check()
    harness.run()
    while harness.schedule() or harness.answer():
        pass
    harness.check()
    totals = {name: int(value) for name, value in harness.scheduler.stats().items() if isinstance(value, int)}
    assert totals["kv_pages_free"] + totals["kv_pages_evictable"] == totals["kv_pages_total"]
    assert totals["disk_bytes"] <= folder.limit * folder.page_bytes
    return totals


def run_many(count: int) -> list[dict[str, int]]:
    return [run_at_random(seed) for seed in range(count)]


def test_no_token_changes_and_no_page_is_lost() -> None:
    totals = run_many(RUNS)
    for what in ("loaded", "stored", "evicted", "failed"):
        assert sum(total[f"disk_{what}_tokens_total"] for total in totals) > 100, f"nothing was ever {what}"


BEGIN_LOAD, END_LOAD = KVMemory.begin_load, KVMemory.end_load
REMOVE, ROOT_KEY, WAIT_FOR = DiskTier._remove, DiskTier._root_key, DiskTier.wait_for


def load_what_failed(memory: KVMemory, node: RadixNode, key: bytes, pages: array[int], good: int) -> None:
    END_LOAD(memory, node, key.ljust(len(pages) * memory.page_size * 4, b"\1"), pages, len(pages))


def leak_a_failed_load(memory: KVMemory, node: RadixNode, key: bytes, pages: array[int], good: int) -> None:
    END_LOAD(memory, node, key, pages[:good], good)


def load_without_a_lock(memory: KVMemory, request: Request, depth: int, count: int) -> tuple[RadixNode, array[int]]:
    node, pages = BEGIN_LOAD(memory, request, depth, count)
    memory.cache.unlock(node)
    return node, pages


def store_what_is_gone(tier: DiskTier, pages: Iterable[int]) -> None:
    for page in pages:
        tier._keys.pop(page)


def count_removed_at_once(tier: DiskTier) -> PageMoves:
    moves = REMOVE(tier)
    move = tier._moves[moves.number]
    tier.used, move.size = tier.used - move.size, 0
    return moves


def forget_the_salt(tier: DiskTier, cache_salt: object) -> bytes:
    return ROOT_KEY(tier, "")


def wait_for_ever(tier: DiskTier, request: Request, *rest: Any) -> bool:
    request.load_until = 1e18
    return WAIT_FOR(tier, request, *rest)


def nothing(*args: Any) -> None:
    pass


PLANTED: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "what failed to load enters the cache": (KVMemory, "end_load", load_what_failed),
    "pages of a failed load leak": (KVMemory, "end_load", leak_a_failed_load),
    "a load does not lock its prefix": (KVMemory, "begin_load", load_without_a_lock),
    "an evicted page is stored": (DiskTier, "removed", store_what_is_gone),
    "room counts before the files are gone": (DiskTier, "_remove", count_removed_at_once),
    "keys have no salt": (DiskTier, "_root_key", forget_the_salt),
    "a flush leaves files": (DiskTier, "forget_all", nothing),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, instead = PLANTED[bug]
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises((AssertionError, KeyError)):
        run_many(200)
