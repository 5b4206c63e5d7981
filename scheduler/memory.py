"""KV memory as requests use it: the page allocator and the radix cache behind one door.

A page is in exactly one place: free, in the radix tree, private to one request, *loading*: being filled from a slower
tier, or *deferred*: given up while a step in flight may still read it, and free once that step's result is in.
`available` counts what can be had now: free pages and tree pages that no lock protects.

Pages promised to requests that must not be retracted again (`Request.reserved_pages`) are set aside: `spare` is what
the others may take.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence

from vibe_sgl_lite.scheduler.radix_cache import RadixCache, RadixNode
from vibe_sgl_lite.scheduler.request import NO_SLOT, TOKEN_BYTES, Request

EVICT_BATCH = 32  # pages at most that one eviction frees beyond what is needed at once


class PageAllocator:
    """The free list. Hands out page numbers 0..num_pages-1, the most recently freed first (their memory is warm)."""

    __slots__ = ("_free", "num_pages")

    def __init__(self, num_pages: int) -> None:
        self.reset(num_pages)

    def reset(self, num_pages: int) -> None:
        """All pages are free."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages that nobody else holds. The caller has made sure that so many are free."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        return pages

    def free(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return list(self._free)


class KVMemory:
    """All page bookkeeping. Pages and tokens are counted in int; page tables are `array('i')`."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size, self.allocator.free)
        self.reserved = 0
        self.num_deferred = 0
        self.num_loading = 0
        self._deferred: deque[tuple[int, array[int]]] = deque()
        self._evict_batch = min(EVICT_BATCH, num_pages // 64)

    @property
    def available(self) -> int:
        return self.allocator.num_free + self.cache.num_evictable

    @property
    def spare(self) -> int:
        return self.available - self.reserved

    def pages_for(self, tokens: int) -> int:
        """Pages that hold the KV of `tokens` tokens."""
        return -(-tokens // self.page_size)

    # --------------------------------------------------------------------------------------------- slots come and go

    def attach(self, request: Request) -> None:
        """Give a request the cached prefix of its tokens, locked. At least one token is left to compute."""
        assert not request.pages
        assert request.node is None
        if not request.uses_cache:
            return
        request.node, request.pages = self.cache.match(request.cache_salt, request.tokens, self.readable(request))
        self.cache.lock(request.node)
        request.num_shared_pages = len(request.pages)
        request.num_computed_tokens = len(request.pages) * self.page_size

    def drop_prefix(self, request: Request) -> None:
        """Undo `attach`."""
        assert len(request.pages) == request.num_shared_pages
        if request.node is not None:
            self.cache.unlock(request.node)
            request.node = None
        self._forget(request)

    def detach(self, request: Request) -> None:
        """Take back every page of a request that is in no step in flight; what is computed stays in the cache."""
        if request.uses_cache:
            if not request.tainted:
                self.store(request, min(request.num_computed_tokens, request.num_tokens), in_flight=False)
            assert request.node is not None
            self.allocator.free(request.pages[request.num_shared_pages :])
            self.cache.unlock(request.node)
            request.node = None
        else:
            self.allocator.free(request.pages)
        self._forget(request)

    def cached_length(self, request: Request) -> int:
        """Tokens that `attach` would find for a waiting request. Changes nothing; looked up anew only if need be."""
        if request.cached_version != self.cache.version:
            request.cached_version = self.cache.version
            request.cached_depth = self.cache.match_length(request.cache_salt, request.tokens, self.readable(request))
        return request.cached_depth

    def locate(self, request: Request) -> RadixNode | None:
        """The tree node in which a waiting request's cached prefix ends; None without one. Changes nothing."""
        return self.cache.locate(request.cache_salt, request.tokens, self.readable(request))[0]

    @staticmethod
    def readable(request: Request) -> int:
        """How many of its tokens it may take from the cache: all but one, which must be computed to sample.

        Logprobs of the prompt need every hidden state; once they are told, a resumed request may read the cache.
        """
        recomputes = request.prompt_logprobs is not None and request.num_generated == 0
        return 0 if recomputes or not request.uses_cache else request.num_tokens - 1

    # --------------------------------------------------------------------------------------------- pages come and go

    def grow(self, request: Request, count: int) -> list[int]:
        """Append `count` pages to a request's table; the caller has checked `spare` or `available`."""
        pages = self._take(count)
        request.pages.extend(pages)
        if request.reserved_pages:
            taken = min(count, request.reserved_pages)
            request.reserved_pages -= taken
            self.reserved -= taken
        return pages

    def grow_each(self, requests: Sequence[Request]) -> list[int]:
        """Append one page to each request's table; the caller has checked as for `grow`."""
        pages = self._take(len(requests))
        for request, page in zip(requests, pages, strict=True):
            request.pages.append(page)
            if request.reserved_pages:
                request.reserved_pages -= 1
                self.reserved -= 1
        return pages

    def shrink(self, request: Request) -> None:
        """Take back what the rest of its tokens does not reach; what a request is promised stays set aside for it.

        A step in flight may have been planned with these pages, but the ranks, who know how many tokens it began with,
        do not touch them.
        """
        keep = self.pages_for(request.num_computed_tokens)
        freed = request.pages[keep:]
        if freed:
            del request.pages[keep:]
            self.allocator.free(freed)
            if request.guaranteed:
                request.reserved_pages += len(freed)
                self.reserved += len(freed)

    def store(self, request: Request, num_tokens: int, *, in_flight: bool) -> list[tuple[int, int]]:
        """Hand the full pages of the first `num_tokens` tokens, all computed and finite, to the cache.

        Where the cache knows a page already, the request's own one is given up and its table says the cache's. Returns
        these changes as (index in the table, page). `in_flight`: a step in flight may read the page given up.
        """
        if not request.uses_cache:
            return []
        assert request.node is not None
        start, end = request.num_shared_pages, num_tokens // self.page_size
        if end <= start:
            return []
        page_bytes = self.page_size * TOKEN_BYTES
        own = request.pages[start:end]
        key = bytes(request.tokens[start * page_bytes : end * page_bytes])
        node, held = self.cache.insert(request.node, key, own)
        self.cache.lock(node, above=request.node)
        request.node = node
        request.num_shared_pages = end
        if held == own:
            return []
        changes, duplicates = [], array("i")
        for index, (mine, theirs) in enumerate(zip(own, held, strict=True), start):
            if mine != theirs:
                request.pages[index] = theirs
                changes.append((index, theirs))
                duplicates.append(mine)
        if in_flight:
            self._deferred.append((request.last_step, duplicates))
            self.num_deferred += len(duplicates)
        else:
            self.allocator.free(duplicates)
        return changes

    def step_done(self, step: int) -> None:
        """The result of `step` is in: pages deferred until then are free."""
        while self._deferred and self._deferred[0][0] <= step:
            pages = self._deferred.popleft()[1]
            self.num_deferred -= len(pages)
            self.allocator.free(pages)

    def begin_load(self, request: Request, depth: int, count: int) -> tuple[RadixNode, array[int]]:
        """`count` pages for what follows the `depth` tokens of a request that are in the tree, to be filled by somebody
        else; and the node below which they belong, locked. The caller has checked `spare` for all the request's pages.
        """
        node, above = self.cache.match(request.cache_salt, request.tokens, depth)
        assert len(above) * self.page_size == depth
        self.cache.lock(node)
        self.num_loading += count
        return node, array("i", self._take(count))

    def end_load(self, node: RadixNode, key: bytes, pages: array[int], good: int) -> None:
        """They are filled: the first `good` of them, which hold the tokens `key`, go into the tree, the rest are free.
        Some may have been computed meanwhile."""
        held = self.cache.insert(node, key, pages[:good])[1]
        self.cache.unlock(node)
        self.num_loading -= len(pages)
        self.allocator.free(mine for mine, theirs in zip(pages, held, strict=False) if mine != theirs)
        self.allocator.free(pages[good:])

    def reserve(self, request: Request) -> None:
        """Set aside all that the request can still need."""
        assert request.slot != NO_SLOT
        assert request.reserved_pages == 0
        request.reserved_pages = self.pages_for(request.kv_limit) - len(request.pages)
        self.reserved += request.reserved_pages

    def _take(self, count: int) -> list[int]:
        """Free pages, after an eviction if there are too few."""
        short = count - self.allocator.num_free
        if short > 0:
            self.cache.evict(max(short, self._evict_batch))
        return self.allocator.allocate(count)

    def unreserve(self, request: Request) -> None:
        self.reserved -= request.reserved_pages
        request.reserved_pages = 0

    def lose(self, holders: Iterable[Request]) -> None:
        """The ranks are gone, and with them what every page held: all are free, and the `holders` have none."""
        self.cache.clear()
        self.allocator.reset(self.num_pages)
        self._deferred.clear()
        self.num_deferred = self.num_loading = 0
        for request in holders:
            self.unreserve(request)
            request.node = None
            self._forget(request)

    def resize(self, num_pages: int) -> None:
        """New ranks with so many pages, before any is taken."""
        assert self.allocator.num_free == self.num_pages
        self.num_pages = num_pages
        self._evict_batch = min(EVICT_BATCH, num_pages // 64)
        self.allocator.reset(num_pages)

    @staticmethod
    def _forget(request: Request) -> None:
        assert request.reserved_pages == 0
        request.pages = array("i")
        request.num_shared_pages = 0
        request.num_computed_tokens = 0
