"""Pages on the disk: random runs against ranks that notice every wrong page, and the rules one by one."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler.fake_folder import FakeFolder, FakeMover
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.messages import PageMoves, PagesMoved, pack_ids, unpack_ids
from vibe_sgl_lite.scheduler.cost import CostModel, chunk_work
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import RadixNode
from vibe_sgl_lite.scheduler.request import Request, samples_of
from vibe_sgl_lite.scheduler.tiers.disk import DiskTier, TierContents, TierCounts
from vibe_sgl_lite.scheduler.tiers.host import HostTier
from vibe_sgl_lite.scheduler.tiers.keys import PageKeys
from vibe_sgl_lite.scheduler.tools.replay import replay
from vibe_sgl_lite.scheduler.tools.trace import TraceWriter

PAGE = 4
RUNS = int(os.environ.get("DISK_TIER_RUNS", "25"))
STORY, OTHER = list(range(40)), [7, 7, 7, *list(range(30))]


def run_at_random(seed: int, rules: int = 60) -> dict[str, int]:
    """Prompts that share beginnings, a small pool, and whatever may happen to ranks, files and cache."""
    rng = random.Random(seed)
    folder = FakeFolder(rng, rng.choice([3, 12, 60]), rng.choice([1, 2]), rng.choice([0, 0.2, 0.5]))
    folder.host_slots = rng.choice([0, 1, 5, 100])
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
    assert sum(total["host_restored_tokens_total"] for total in totals) > 100


BEGIN_LOAD, END_LOAD = KVMemory.begin_load, KVMemory.end_load
REMOVE, ROOT_KEY, DISPLACED = DiskTier._remove, PageKeys.root_key, HostTier._displaced


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
        tier._keys.of.pop(page)


def count_removed_at_once(tier: DiskTier) -> PageMoves:
    moves = REMOVE(tier)
    move = tier._moves[moves.number]
    tier.used, move.size = tier.used - move.size, 0
    return moves


def forget_the_salt(keys: PageKeys, cache_salt: object) -> bytes:
    return ROOT_KEY(keys, "")


def displace_what_is_coming(host: HostTier) -> int | None:
    host._coming.clear()
    return DISPLACED(host)


def save_too_late(host: Any) -> list[PageMoves]:
    late, host._copies = host._copies, []
    moves, host.late = [PageMoves(-1, host=pack_ids(getattr(host, "late", [])))], late
    return moves if moves[0].host else []


def nothing(*args: Any) -> None:
    pass


PLANTED: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "what failed to load enters the cache": (KVMemory, "end_load", load_what_failed),
    "pages of a failed load leak": (KVMemory, "end_load", leak_a_failed_load),
    "a load does not lock its prefix": (KVMemory, "begin_load", load_without_a_lock),
    "an evicted page is stored": (DiskTier, "removed", store_what_is_gone),
    "room counts before the files are gone": (DiskTier, "_remove", count_removed_at_once),
    "keys have no salt": (PageKeys, "root_key", forget_the_salt),
    "what is restored displaces itself": (HostTier, "_displaced", displace_what_is_coming),
    "pages are saved after the next step": (HostTier, "moves", save_too_late),
    "a flush leaves files": (DiskTier, "forget_all", nothing),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, instead = PLANTED[bug]
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises((AssertionError, KeyError)):
        run_many(200)


# ---------------------------------------------------------------------------------------------------- the rules, alone


class Alone:
    """A tier and its tree without requests: prefixes are used, and everything is answered at once."""

    def __init__(self, limit: int, num_pages: int = 64, contents: TierContents | None = None) -> None:
        self.folder = FakeFolder(random.Random(0), limit)
        self.memory = KVMemory(num_pages, PAGE)
        self.tier = DiskTier(contents or self.folder.contents(), self.memory, CostModel(16.0), TierCounts(), 0)
        self.memory.cache.watchers.append(self.tier)

    def use(self, tokens: Sequence[int]) -> None:
        """The whole pages of a prompt are computed or found, and all of them that may be stored are."""
        cache = self.memory.cache
        node, found = cache.match("", pack_ids(tokens), len(tokens))
        pages = array("i", self.memory.allocator.allocate(len(tokens) // PAGE - len(found)))
        cache.insert(node, pack_ids(tokens[len(found) * PAGE : len(tokens) // PAGE * PAGE]), pages)
        reader = samples_of(request(0, tokens), 0, 0.0)[0]
        _, reader.pages = cache.match("", pack_ids(tokens), len(tokens))
        reader.num_shared_pages = len(reader.pages)
        self.tier.used_by(reader)
        while self.tier.has_moves(-1.0):
            for moves in self.tier.moves(-1.0):
                self.tier.answered(PagesMoved(moves.number))
                assert self.tier.used <= self.folder.limit * self.folder.page_bytes

    def files(self) -> set[tuple[int, ...]]:
        """The prefixes of which there is a file."""
        cache, tier, found = self.memory.cache, self.tier, set()
        paths: dict[int, list[int]] = {}
        for node in cache.nodes():
            path = paths[id(node)] = paths.get(id(node.parent), []) + unpack_ids(node.key)
            for place, page in enumerate(reversed(node.pages)):
                if tier._keys.of[page] in tier._index:
                    found.add(tuple(path[: len(path) - place * PAGE]))
        return found


@pytest.mark.parametrize("seed", range(8))
def test_what_was_used_last_is_kept_within_the_bound(seed: int) -> None:
    """Against when each prefix was last used: what goes was used before what stays, and gives way to something."""
    rng = random.Random(seed)
    limit = rng.choice([3, 10, 25])
    alone, used = Alone(limit, 500), dict[tuple[int, ...], int]()
    for now in range(60):
        prompt = [rng.randrange(3)] * (PAGE * rng.randint(1, 4)) + [rng.randrange(4)] * (PAGE * rng.randint(0, 3))
        before = alone.files()
        alone.use(prompt)
        after = alone.files()
        mine = {tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)}
        used |= dict.fromkeys(mine, now)
        gone = before - after
        assert not gone & mine, "a prompt displaced itself"
        assert after <= before | mine
        assert len(mine & after) == min(len(mine), limit) or not before - mine - gone, "there was room to be made"
        assert all(used[one] <= used[other] for one in gone for other in after - mine)
        assert not gone or len(before | mine) > limit
        assert len(gone) <= max(0, len(before | mine) - limit)


def test_a_prompt_that_is_longer_than_the_bound_keeps_its_beginning() -> None:
    alone = Alone(5)
    alone.use(range(12 * PAGE))
    assert alone.files() == {tuple(range(end)) for end in range(PAGE, 6 * PAGE, PAGE)}
    alone.use(range(20 * PAGE))
    assert alone.files() == {tuple(range(end)) for end in range(PAGE, 6 * PAGE, PAGE)}


def test_a_page_whose_damaged_file_is_yet_to_be_removed_gets_another() -> None:
    alone, story = Alone(9), range(4 * PAGE)
    alone.use(story)
    alone.tier._doom([*alone.tier._index])
    assert alone.files() == set()
    alone.use(story)
    assert len(alone.files()) == 4


def test_a_key_is_of_weights_salt_and_every_token_before() -> None:
    def keys(tokens: Sequence[int], root: bytes = b"root", salt: str = "") -> list[bytes]:
        contents = TierContents(root, 1, 8192, 8192, 10**9)
        alone = Alone(9, contents=contents)
        pages = array("i", alone.memory.allocator.allocate(len(tokens) // PAGE))
        node, _ = alone.memory.cache.match(salt, b"", 0)
        alone.memory.cache.insert(node, pack_ids(tokens), pages)
        return [alone.tier._keys.of[page] for page in pages]

    plain = keys(range(12))
    assert plain == keys(range(12))
    assert keys([*range(8), *range(20, 24)])[:2] == plain[:2]
    different = [plain, keys([99, *range(1, 12)]), keys(range(12), b"other weights"), keys(range(12), salt="a")]
    assert len({key for chain in different for key in chain}) == 12


def loads(harness: Harness) -> int:
    return harness.scheduler.state.memory.num_loading


def warm_folder(**fields: Any) -> FakeFolder:
    """What an engine before has left of STORY."""
    folder = FakeFolder(random.Random(0), 100, **fields)
    harness = Harness(config(), folder=folder)
    harness.add(request(0, STORY))
    harness.run()
    while harness.schedule() or harness.answer():
        pass
    return folder


def test_a_restart_is_warm_and_says_so() -> None:
    harness = Harness(config(), folder=warm_folder())
    for uid in range(3):
        harness.add(request(uid, STORY))
    harness.run()
    assert [harness.samples[uid].cached_tokens for uid in range(3)] == [36, 36, 36]
    stats = harness.scheduler.stats()
    assert stats["disk_loaded_tokens_total"] == 36, "once for all three"
    assert stats["cached_tokens_total"] == 3 * 36


def test_others_run_while_one_waits_for_its_pages() -> None:
    harness = Harness(config(chunked_prefill_size=100), folder=warm_folder())
    harness.add(request(0, STORY))
    harness.add(request(1, OTHER))
    assert harness.schedule()
    assert harness.rank.row_uids[0] == [1]
    assert loads(harness) == 9
    harness.complete()
    while harness.answer():
        pass
    assert loads(harness) == 0
    harness.schedule()
    assert 0 in harness.rank.row_uids[harness.rank.last_step or 0]
    harness.run()


def measured(harness: Harness, seconds_a_token: float) -> None:
    for tokens in (1, 16, 100):
        for _ in range(30):
            harness.scheduler.cost.observe(chunk_work(0, tokens), 1e-6 + tokens * seconds_a_token)


@pytest.mark.parametrize(("seconds_a_token", "pays"), [(1e-6, False), (1e-2, True)])
def test_pages_are_loaded_where_that_is_faster(seconds_a_token: float, pays: bool) -> None:
    harness = Harness(config(), folder=warm_folder())
    measured(harness, seconds_a_token)
    harness.add(request(0, STORY))
    harness.schedule()
    assert (loads(harness) > 0) == pays
    harness.run()
    assert harness.samples[0].cached_tokens == (36 if pays else 0)


def test_a_few_tokens_that_took_little_do_not_say_what_long_prompts_take() -> None:
    """As after a restart, when all that was computed is the ends of prompts whose rest was loaded."""
    harness = Harness(config(), folder=warm_folder())
    for _ in range(30):
        harness.scheduler.cost.observe(chunk_work(0, 4), 1e-5)
    harness.add(request(0, STORY))
    harness.run()
    assert harness.samples[0].cached_tokens == 36


def test_a_load_that_takes_longer_than_computing_is_not_waited_for() -> None:
    """Its pages are free when it is done after all."""
    harness = Harness(config(), folder=warm_folder())
    measured(harness, 1e-2)
    harness.add(request(0, STORY))
    assert not harness.schedule()
    harness.now += 0.3
    assert not harness.schedule()
    harness.now += 0.2
    assert harness.schedule(), "36 tokens would take 0.36 s"
    while harness.complete() or harness.schedule():
        harness.check()
    assert harness.samples[0].finish is not None
    assert loads(harness) == 9
    harness.run()
    assert loads(harness) == 0
    assert harness.samples[0].cached_tokens == 0


def test_a_request_is_loaded_for_before_there_is_a_slot() -> None:
    harness = Harness(config(max_running_requests=1), folder=warm_folder())
    harness.add(request(0, OTHER, max_new_tokens=30))
    harness.add(request(1, STORY))
    for _ in range(3):
        harness.schedule()
        harness.complete()
    assert loads(harness) == 9
    harness.run()
    assert harness.samples[1].cached_tokens == 36


def test_no_load_takes_the_pages_of_those_that_run() -> None:
    harness = Harness(config(num_pages=14, max_running_requests=2), folder=warm_folder())
    harness.add(request(0, OTHER, max_new_tokens=20))
    harness.schedule()
    harness.add(request(1, STORY))
    harness.schedule()
    assert loads(harness) == 0
    harness.run()
    assert harness.scheduler.stats()["num_retractions"] == 0


def test_a_folder_that_takes_nothing_more_gets_nothing_more() -> None:
    folder = FakeFolder(random.Random(0), 100)
    harness = Harness(config(), folder=folder)
    harness.add(request(0, STORY))
    harness.schedule()
    harness.complete()
    harness.schedule()
    harness.scheduler.pages_moved(PagesMoved(0, 0, pack_ids(range(4)), error="No space left on device"), 0.0)
    harness.movers[0] = FakeMover(folder, 0, harness.rank.pages, 0)
    harness.run()
    assert not harness.scheduler.stats()["disk_stores"]
    assert folder.files == {}


def test_a_run_with_a_folder_is_repeated_exactly(tmp_path: Path) -> None:
    settings, path = config(num_pages=30), tmp_path / "trace"
    folder = warm_folder()
    harness = Harness(settings, observers=lambda harness: [TraceWriter(path, settings)], folder=folder)
    for uid in range(6):
        harness.add(request(uid, STORY[: 10 + 5 * uid], max_new_tokens=9))
        harness.step()
    harness.run()
    harness.lose_ranks()
    harness.ranks_ready()
    harness.add(request(9, STORY, max_new_tokens=9))
    harness.run()
    harness.scheduler.close()
    _, core = replay(path)
    assert core.stats() == harness.scheduler.stats()
    assert int(core.stats()["disk_loaded_tokens_total"]) > 0


def test_with_other_weights_nothing_is_stored_or_loaded() -> None:
    """They make other pages of the same tokens; what is still on its way does no harm."""
    folder = warm_folder()
    harness, before = Harness(config(), folder=folder), dict(folder.files)
    harness.add(request(0, STORY))
    harness.schedule()
    assert loads(harness) == 9
    for watcher in harness.scheduler.state.memory.cache.watchers:
        watcher.cleared()
    while harness.answer():
        pass
    assert loads(harness) == 0
    harness.add(request(1, OTHER))
    harness.run()
    harness.lose_ranks()
    harness.ranks_ready()
    harness.add(request(2, OTHER))
    harness.add(request(3, STORY))
    harness.run()
    assert folder.files == before
    assert harness.scheduler.stats()["disk_pages"] == 0
