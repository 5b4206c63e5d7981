"""Which token prefixes have their KV in which pages: a compressed radix tree over packed int32 token ids.

    match     longest cached prefix of a token sequence, in whole pages
    insert    hand computed pages to the tree; where it already knows the prefix, its own pages win
    lock      protect a node and everything above it; `unlock` undoes it
    evict     give back exactly so many pages, least recently used leaves first

An edge carries whole pages: its key is a multiple of `4 * page_size` bytes, and a node's children are told apart by the
bytes of their first page, so keys compare with memcmp and never through a hash alone. Nodes split where sequences part.
A split keeps the lower half as the old object: whoever holds a lock on a node keeps it, and means the same prefix.

Locks count the users of a node; a lock is taken on the whole path up to the root, so a node's count is never below a
child's. Eviction trims the tail of the least recently used unlocked leaf, no more than asked for; a parent left without
children becomes a candidate. Candidates wait in a heap, at most one entry a node, keyed by an access number that is
never above the node's real one; a stale entry is pushed back when it comes up, so the order is exactly LRU.

Every cache salt has a root of its own. A root without children and users is forgotten. When the model's weights change,
all roots are parked: nothing matches them any more, until the weights that made their pages are back, if ever.

Knows nothing of requests or of who computes pages. Method: radix tree KV reuse as in "SGLang: Efficient Execution of
Structured Language Model Programs" (Zheng et al., 2024), section 3.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple, Protocol

TOKEN_BYTES = 4


class RadixNode:
    """One edge of the tree with the node at its lower end. `key`: packed tokens; `pages`: one number a page of key."""

    __slots__ = ("cache_salt", "children", "key", "last_access", "locks", "pages", "parent", "queued")

    def __init__(self, cache_salt: Hashable, key: bytes, pages: array[int], parent: RadixNode | None) -> None:
        self.cache_salt = cache_salt
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, RadixNode] = {}
        self.locks = 0
        self.last_access = 0
        self.queued = False  # has an entry in the eviction heap


class Parked(NamedTuple):
    """The salt of a root that is out of reach. name: of the weights that its pages belong to."""

    name: Hashable
    cache_salt: Hashable


class CacheWatcher(Protocol):
    """Told what enters and leaves the tree. A node that is split stays what it was."""

    def stored(self, node: RadixNode) -> None: ...

    def removed(self, pages: Iterable[int]) -> None: ...

    def cleared(self) -> None: ...


class RadixCache:
    """See the module. All lengths are in tokens, all counts in pages, unless a name says bytes.

    release: called with the pages that eviction gives back.
    """

    def __init__(self, page_size: int, release: Callable[[Iterable[int]], None]) -> None:
        assert page_size >= 1
        self.page_size = page_size
        self.num_cached = 0  # pages in the tree, locked or not
        self.num_evictable = 0  # of these, in nodes without a lock
        self.num_evicted = 0  # pages given back so far
        self.num_nodes = 0  # without the roots
        self.version = 0  # changes whenever a match could have another length
        self.watchers: list[CacheWatcher] = []
        self._page_bytes = page_size * TOKEN_BYTES
        self._release = release
        self._roots: dict[Hashable, RadixNode] = {}
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._pushes = 0
        self._access = 0

    # ------------------------------------------------------------------------------------------------------ reading

    def match(self, cache_salt: Hashable, tokens: bytes | bytearray, limit: int) -> tuple[RadixNode, array[int]]:
        """The node that ends the longest cached prefix of `tokens[:limit]`, and that prefix's pages.

        The path counts as used now. A node that only begins like the tokens is split, so the prefix ends at a node.
        """
        self._access += 1
        node = self._root(cache_salt)
        pages = array("i")
        at, end = 0, limit // self.page_size * self._page_bytes
        while at < end:
            child = node.children.get(bytes(tokens[at : at + self._page_bytes]))
            if child is None:
                break
            common = self._common(child.key, tokens, at, end - at)
            if common < len(child.key):
                child = self._split(child, common)
            child.last_access = self._access
            pages.extend(child.pages)
            node = child
            at += common
        node.last_access = self._access
        return node, pages

    def match_length(self, cache_salt: Hashable, tokens: bytes | bytearray, limit: int) -> int:
        """Tokens that `match` would find. Changes nothing, not even what counts as recently used."""
        return self.locate(cache_salt, tokens, limit)[1]

    def locate(self, cache_salt: Hashable, tokens: bytes | bytearray, limit: int) -> tuple[RadixNode | None, int]:
        """The node in which the longest cached prefix ends, perhaps inside it, and the prefix' length in tokens."""
        node = self._roots.get(cache_salt)
        at, end = 0, limit // self.page_size * self._page_bytes
        while node is not None and at < end:
            child = node.children.get(bytes(tokens[at : at + self._page_bytes]))
            if child is None:
                break
            node = child
            common = self._common(child.key, tokens, at, end - at)
            at += common
            if common < len(child.key):
                break
        return node, at // TOKEN_BYTES

    # ------------------------------------------------------------------------------------------------------ writing

    def insert(self, node: RadixNode, key: bytes, pages: array[int]) -> tuple[RadixNode, array[int]]:
        """Put `key`, whole pages of tokens that follow `node`, with its pages into the tree.

        Returns the node that now ends the sequence, and the pages that the tree holds for `key`. Where these differ
        from the given ones the tree knew the tokens already: the given page stays the caller's, a duplicate to free.
        """
        assert len(key) == len(pages) * self._page_bytes
        self._access += 1
        held = array("i")
        at, end = 0, len(key)
        while at < end:
            child = node.children.get(key[at : at + self._page_bytes])
            if child is None:
                fresh = pages[len(held) :]
                child = RadixNode(node.cache_salt, key[at:] if at else key, fresh, node)
                node.children[key[at : at + self._page_bytes]] = child
                self.num_nodes += 1
                self.num_cached += len(fresh)
                self.num_evictable += len(fresh)
                self.version += 1
                child.last_access = self._access
                self._queue(child)
                for watcher in self.watchers:
                    watcher.stored(child)
                common = end - at
            else:
                common = self._common(child.key, key, at, end - at)
                if common < len(child.key):
                    child = self._split(child, common)
                child.last_access = self._access
            held.extend(child.pages)
            node = child
            at += common
        return node, held

    def lock(self, node: RadixNode, above: RadixNode | None = None) -> None:
        """Protect `node` and its ancestors, up to `above` when that one's path is locked by the caller already."""
        walk: RadixNode | None = node
        while walk is not above:
            assert walk is not None, "`above` is no ancestor"
            if walk.locks == 0:
                self.num_evictable -= len(walk.pages)
            walk.locks += 1
            walk = walk.parent

    def unlock(self, node: RadixNode) -> None:
        """Give up one lock of `node` and its ancestors; they count as used now."""
        self._access += 1
        walk: RadixNode | None = node
        while walk is not None:
            assert walk.locks > 0, "unlocked more often than locked"
            walk.locks -= 1
            walk.last_access = self._access
            if walk.locks == 0:
                self.num_evictable += len(walk.pages)
                self._queue(walk)
            walk = walk.parent

    def evict(self, count: int) -> int:
        """Give back `count` pages, or all that no lock protects if these are fewer; returns how many it were."""
        left = count
        while left > 0 and self._heap:
            key, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.locks or node.children or node.parent is None:
                continue
            if node.last_access > key:
                self._queue(node)
                continue
            left -= self._trim(node, left)
        if left < count:
            self.version += 1
        return count - left

    def flush(self) -> int:
        """Give back every page. Nothing may be locked."""
        assert self.num_evictable == self.num_cached, "flush while pages are in use"
        return self.evict(self.num_cached)

    def clear(self) -> None:
        """Forget every page, locked or not, and release none: what they held is gone."""
        self._roots.clear()
        self._heap.clear()
        for watcher in self.watchers:
            watcher.cleared()
        self.num_cached = self.num_evictable = self.num_nodes = 0
        self.version += 1

    def drop(self, cache_salt: Hashable) -> int:
        """Give back every unlocked page of one cache salt."""
        root = self._roots.get(cache_salt)
        freed = 0
        for node in self._leaves_up(root) if root is not None else []:
            if node.locks == 0 and not node.children:
                freed += self._trim(node, len(node.pages))
        if freed:
            self.version += 1
        return freed

    def park(self, name: Hashable | None) -> None:
        """What is here, in use or not, matches nothing until `unpark` of the same name. None: it never does again, and
        what nobody has locked is given back."""
        if name is None:
            self.evict(self.num_cached)
        roots, self._roots = self._roots, {}
        for salt, root in roots.items():
            if name is None:
                root.cache_salt = Parked(object(), salt)
            elif not isinstance(salt, Parked):
                root.cache_salt = Parked(name, salt)
            self._roots[root.cache_salt] = root
        self.version += 1
        for watcher in self.watchers:
            watcher.cleared()

    def unpark(self, name: Hashable) -> None:
        """The weights of this name are back."""
        for salt in [salt for salt in self._roots if isinstance(salt, Parked) and salt.name == name]:
            root = self._roots.pop(salt)
            root.cache_salt = salt.cache_salt
            self._roots[salt.cache_salt] = root
        self.version += 1

    # ------------------------------------------------------------------------------------------------------- checks

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the roots, parents before children, for checks and weights."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    @property
    def num_roots(self) -> int:
        return len(self._roots)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _root(self, cache_salt: Hashable) -> RadixNode:
        root = self._roots.get(cache_salt)
        if root is None:
            root = self._roots[cache_salt] = RadixNode(cache_salt, b"", array("i"), None)
        return root

    def _common(self, key: bytes, tokens: bytes | bytearray, at: int, most: int) -> int:
        """Bytes, whole pages, that `key` shares with `tokens[at : at + most]`; the first page is known to match."""
        if len(key) <= most and tokens.startswith(key, at):
            return len(key)
        low, high = 1, min(len(key), most) // self._page_bytes  # low pages match; more than high do not
        while low < high:
            middle = (low + high + 1) // 2
            start, stop = low * self._page_bytes, middle * self._page_bytes
            if tokens.startswith(key[start:stop], at + start):
                low = middle
            else:
                high = middle - 1
        return low * self._page_bytes

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Cut a node's edge after `at` bytes; returns the new upper node. `node` stays the lower one."""
        parent = node.parent
        assert parent is not None
        assert 0 < at < len(node.key)
        cut = at // self._page_bytes
        upper = RadixNode(node.cache_salt, node.key[:at], node.pages[:cut], parent)
        self.num_nodes += 1
        upper.locks = node.locks
        upper.last_access = node.last_access
        parent.children[node.key[: self._page_bytes]] = upper
        node.key = node.key[at:]
        node.pages = node.pages[cut:]
        node.parent = upper
        upper.children[node.key[: self._page_bytes]] = node
        return upper

    def _queue(self, node: RadixNode) -> None:
        """Make an unlocked leaf a candidate for eviction; forget an unused, empty root."""
        if node.children or node.locks:
            return
        if node.parent is None:
            self._roots.pop(node.cache_salt, None)
        elif not node.queued:
            node.queued = True
            self._pushes += 1
            heapq.heappush(self._heap, (node.last_access, self._pushes, node))

    def _trim(self, node: RadixNode, count: int) -> int:
        """Evict the last `count` pages of an unlocked leaf, the whole leaf if it has no more; returns how many."""
        parent = node.parent
        assert parent is not None
        count = min(count, len(node.pages))
        keep = len(node.pages) - count
        for watcher in self.watchers:
            watcher.removed(node.pages[keep:])
        self._release(node.pages[keep:])
        self.num_cached -= count
        self.num_evictable -= count
        self.num_evicted += count
        if keep:
            node.pages = node.pages[:keep]
            node.key = node.key[: keep * self._page_bytes]
            self._queue(node)
        else:
            del parent.children[node.key[: self._page_bytes]]
            self.num_nodes -= 1
            node.pages = array("i")
            node.parent = None
            self._queue(parent)
        return count

    @staticmethod
    def _leaves_up(root: RadixNode) -> list[RadixNode]:
        order = [root]
        for node in order:
            order.extend(node.children.values())
        return order[:0:-1]  # without the root, children before parents
