"""What a page is called in the slower tiers: a hash of its parent's key and its own tokens.

Before the first stands the root, all that pages' values depend on but tokens, with the cache salt. So a key stands for
all tokens from the beginning, and nobody can make two prefixes that share one (BLAKE2b, 256 bits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Hashable

from vibe_sgl_lite.runtime.page_folder import KEY_BYTES
from vibe_sgl_lite.scheduler.radix_cache import TOKEN_BYTES, RadixNode
from vibe_sgl_lite.scheduler.request import Request


class PageKeys:
    """of: the key of every page in the radix tree, as far as they are known."""

    def __init__(self, root: bytes, page_size: int) -> None:
        self.of: dict[int, bytes] = {}
        self._root = root
        self._step = page_size * TOKEN_BYTES

    def enter(self, node: RadixNode) -> list[tuple[bytes, int]]:
        """A node that is new below its parent: its pages' keys and the pages. Empty if the parent's are not known."""
        parent = node.parent
        assert parent is not None
        key = self.of.get(parent.pages[-1]) if parent.pages else self.root_key(node.cache_salt)
        entered = []
        for place, page in enumerate(node.pages if key is not None else ()):
            key = self.of[page] = _next_key(key, node.key[place * self._step : (place + 1) * self._step])
            entered.append((key, page))
        return entered

    def of_request(self, request: Request, first: int, end: int, known: Container[bytes]) -> list[bytes]:
        """The keys of a request's pages from `first` on, up to `end` or the first that is not `known`.

        What was worked out is kept with the request.
        """
        root = self.root_key(request.cache_salt)
        if request.page_keys is None or request.page_keys[0] != root:
            request.page_keys = [root]
        keys, step = request.page_keys, self._step
        for place in range(end):
            if place + 1 == len(keys):
                keys.append(_next_key(keys[-1], bytes(request.tokens[place * step : (place + 1) * step])))
            if place >= first and keys[place + 1] not in known:
                return keys[first + 1 : place + 1]
        return keys[first + 1 : end + 1]

    def root_key(self, cache_salt: Hashable) -> bytes:
        return hashlib.blake2b(repr(cache_salt).encode(), key=self._root, digest_size=KEY_BYTES).digest()


def _next_key(parent: bytes | None, tokens: bytes) -> bytes:
    assert parent is not None
    return hashlib.blake2b(parent + tokens, digest_size=KEY_BYTES).digest()
