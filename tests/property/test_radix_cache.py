"""The radix cache against a brute-force model: a dictionary of every cached page-long prefix.

The model knows a page by its cache salt and all tokens up to its end. A prefix is matched page by page; eviction looks
at all pages for the unlocked one without a continuation that was used longest ago.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vibe_sgl_lite.runtime.messages import pack_ids
from vibe_sgl_lite.scheduler.memory import PageAllocator
from vibe_sgl_lite.scheduler.radix_cache import RadixCache, RadixNode

NUM_PAGES = 24
EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", "400"))
RULES = int(os.environ.get("SCHEDULER_RULES", "50"))


@dataclass
class ModelPage:
    page: int
    access: int
    locks: int = 0


class RadixCacheMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 4, 16, 64]))
    def begin(self, page_size: int) -> None:
        self.page_size = page_size
        self.bytes = page_size * 4
        self.allocator = PageAllocator(NUM_PAGES)
        self.cache = RadixCache(page_size, self.allocator.free)
        self.model: dict[tuple[str, bytes], ModelPage] = {}
        self.access = 0
        self.held: list[tuple[str, bytes, RadixNode]] = []  # locked prefixes

    # ------------------------------------------------------------------------------------------------ the model

    def prefixes(self, salt: str, tokens: bytes) -> list[tuple[str, bytes]]:
        return [(salt, tokens[:end]) for end in range(self.bytes, len(tokens) + 1, self.bytes)]

    def model_match(self, salt: str, tokens: bytes) -> list[tuple[str, bytes]]:
        found = []
        for prefix in self.prefixes(salt, tokens):
            if prefix not in self.model:
                break
            found.append(prefix)
        return found

    def model_evict(self, count: int) -> list[int]:
        evicted = []
        for _ in range(count):
            parents = {(salt, tokens[: -self.bytes]) for salt, tokens in self.model}
            leaves = [key for key, page in self.model.items() if key not in parents and page.locks == 0]
            if not leaves:
                break
            oldest = min(leaves, key=lambda key: self.model[key].access)
            evicted.append(self.model.pop(oldest).page)
        return evicted

    def tokens(self, letters: list[int], tail: int) -> bytes:
        """Pages of few kinds, so that prefixes meet; `tail` more tokens."""
        return pack_ids([letter for letter in letters for _ in range(self.page_size)] + [9] * (tail % self.page_size))

    # ------------------------------------------------------------------------------------------------ rules

    letters = st.lists(st.integers(0, 2), max_size=8)
    salts = st.sampled_from(["", "a"])

    @rule(letters=letters, tail=st.integers(0, 63), salt=salts)
    def look(self, letters: list[int], tail: int, salt: str) -> None:
        tokens = self.tokens(letters, tail)
        expected = len(self.model_match(salt, tokens)) * self.page_size
        assert self.cache.match_length(salt, tokens, len(tokens) // 4) == expected

    @rule(letters=letters, tail=st.integers(0, 63), salt=salts, cap=st.integers(0, 1))
    def match_and_lock(self, letters: list[int], tail: int, salt: str, cap: int) -> None:
        tokens = self.tokens(letters, tail)
        limit = max(0, len(tokens) // 4 - cap)
        found = self.model_match(salt, tokens[: limit * 4])
        node, pages = self.cache.match(salt, bytearray(tokens), limit)
        self.access += 1
        assert list(pages) == [self.model[key].page for key in found]
        self.cache.lock(node)
        for key in found:
            self.model[key].access = self.access
            self.model[key].locks += 1
        self.held.append((salt, found[-1][1] if found else b"", node))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), letters=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def extend_a_held_prefix(self, data: st.DataObject, letters: list[int]) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        salt, prefix, node = self.held[index]
        short = len(letters) - self.allocator.num_free
        if short > 0:
            assert self.cache.evict(short) == len(self.model_evict(short))
        if len(letters) > self.allocator.num_free:
            return
        pages = array("i", self.allocator.allocate(len(letters)))
        key = self.tokens(letters, 0)
        self.access += 1
        expected = array("i")
        for entry, page in zip(self.prefixes(salt, prefix + key)[len(prefix) // self.bytes :], pages, strict=True):
            known = self.model.setdefault(entry, ModelPage(page, self.access))
            known.access = self.access
            known.locks += 1
            expected.append(known.page)
        end, held = self.cache.insert(node, key, pages)
        self.cache.lock(end, above=node)
        assert held == expected
        self.allocator.free(mine for mine, theirs in zip(pages, held, strict=True) if mine != theirs)
        self.held[index] = (salt, prefix + key, end)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        salt, prefix, node = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.unlock(node)
        self.access += 1
        for key in self.prefixes(salt, prefix):
            self.model[key].access = self.access
            self.model[key].locks -= 1

    @rule(count=st.integers(1, NUM_PAGES))
    def evict(self, count: int) -> None:
        before = set(self.allocator.free_pages())
        freed = self.cache.evict(count)
        evicted = self.model_evict(count)
        assert freed == len(evicted)
        assert set(self.allocator.free_pages()) - before == set(evicted)

    @rule(salt=salts)
    def drop_a_cache_salt(self, salt: str) -> None:
        freed = self.cache.drop(salt)
        doomed = [key for key, page in self.model.items() if key[0] == salt and page.locks == 0]
        assert freed == len(doomed)
        for key in doomed:
            del self.model[key]

    @precondition(lambda self: not self.held)
    @rule()
    def flush(self) -> None:
        assert self.cache.flush() == len(self.model)
        self.model.clear()
        assert self.cache.num_roots == 0

    @rule()
    def clear(self) -> None:
        """What the pages held is gone, locked or not; whoever holds a node has nothing."""
        self.cache.clear()
        self.allocator.reset(NUM_PAGES)
        self.model.clear()
        self.held.clear()
        assert self.cache.num_roots == 0

    # ------------------------------------------------------------------------------------------------ invariants

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.num_cached == len(self.model)
        assert self.cache.num_evictable == sum(page.locks == 0 for page in self.model.values())
        cached = [page for node in self.cache.nodes() for page in node.pages]
        assert sorted(cached) == sorted(page.page for page in self.model.values())
        assert sorted(cached + self.allocator.free_pages()) == list(range(NUM_PAGES))
        for node in self.cache.nodes():
            assert node.locks or node.children or node.queued


TestRadixCache = RadixCacheMachine.TestCase
TestRadixCache.settings = settings(max_examples=EXAMPLES, stateful_step_count=RULES, deadline=None)
