"""What routers are told equals what is cached, whatever happens to the radix tree."""

from __future__ import annotations

import random
from array import array

import pytest

from vibe_sgl_lite.scheduler.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, KvEvents
from vibe_sgl_lite.scheduler.radix_cache import RadixCache

PAGE = 4


class Router:
    """The prefixes that one knows of from events alone: every block's tokens and parent, by hash."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[tuple[int, ...], int | None]] = {}
        self.seen: set[int] = set()

    def hear(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case BlockStored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens):
                    assert len(tokens) == PAGE * len(hashes)
                    assert parent is None or parent in self.blocks
                    assert not self.seen & set(hashes), "a hash is used twice"
                    self.seen |= set(hashes)
                    for place, block in enumerate(hashes):
                        self.blocks[block] = tuple(tokens[place * PAGE : (place + 1) * PAGE]), parent
                        parent = block
                case BlockRemoved(block_hashes=hashes):
                    for block in hashes:
                        del self.blocks[block]
                case AllBlocksCleared():
                    self.blocks.clear()

    def prefixes(self) -> set[tuple[int, ...]]:
        def path(block: int) -> tuple[int, ...]:
            tokens, parent = self.blocks[block]
            return (path(parent) if parent is not None else ()) + tokens

        return {path(block) for block in self.blocks}


def cached(cache: RadixCache) -> set[tuple[int, ...]]:
    """Every whole-page prefix in the tree, without a salt."""
    found: set[tuple[int, ...]] = set()
    paths: dict[int, tuple[int, ...]] = {}
    for node in cache.nodes():
        if node.cache_salt != "":
            continue
        above = paths.get(id(node.parent), ())
        tokens = above + tuple(array("i", node.key))
        paths[id(node)] = tokens
        found |= {tokens[:end] for end in range(len(above) + PAGE, len(tokens) + 1, PAGE)}
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_router_knows_what_is_cached(seed: int) -> None:
    draw = random.Random(seed)
    free = list(range(200))
    cache = RadixCache(PAGE, free.extend)
    events = KvEvents(PAGE)
    cache.watchers.append(events)
    router = Router()
    for _ in range(300):
        action = draw.random()
        if action < 0.75:
            salt = draw.choice(["", "", "", "secret"])
            tokens = array("i", [draw.randrange(2) for _ in range(PAGE * draw.randrange(1, 9))]).tobytes()
            node, have = cache.match(salt, tokens, len(tokens) // 4)
            rest = tokens[len(have) * PAGE * 4 :]
            count = len(rest) // (PAGE * 4)
            cache.lock(node)
            if count > len(free):
                cache.evict(count)
            if 0 < count <= len(free):
                pages = array("i", [free.pop() for _ in range(count)])
                cache.insert(node, rest, pages)
            cache.unlock(node)
        elif action < 0.95:
            cache.evict(draw.randrange(1, 20))
        elif action < 0.97:
            cache.clear()
            free[:] = range(200)
        else:
            cache.drop("")
        router.hear(events.take())
        assert router.prefixes() == cached(cache)
