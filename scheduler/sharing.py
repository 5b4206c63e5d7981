"""In-batch prefix sharing: of several requests with a common prefix that is not cached yet, one computes it.

A *leader* is a request that is computing its prompt. What it has computed is in the cache up to some depth, which grows
chunk by chunk; it is registered under that depth and the tokens that come next. A waiting request whose cached prefix
ends at the same depth and goes on with the same tokens (at least `SHARED_TOKENS` of them, in whole pages) waits for it.
As soon as the two part, or little is left in common, it may run. Samples of one request wait for each other down to a
single shared page.

A hash finds the leader; the whole prefix is then compared token by token.
"""

from __future__ import annotations

from collections.abc import Hashable

from vibe_sgl_lite.scheduler.request import TOKEN_BYTES, Request

SHARED_TOKENS = 32


class PrefixLeaders:
    """Who computes which prefix now. `page_size` in tokens."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._span = -(-SHARED_TOKENS // page_size) * page_size
        self._by_prefix: dict[tuple[Hashable, int, bytes], Request] = {}
        self._by_group: dict[int, Request] = {}
        self._keys: dict[int, tuple[Hashable, int, bytes]] = {}

    def begin(self, request: Request) -> None:
        """The request got a slot, or the cache got more of its prompt: register it under what comes next."""
        self.end(request)
        if not request.uses_cache:
            return
        depth = request.num_shared_pages * self._page_size
        if request.sampling.n > 1 and self._rest(request, depth, self._page_size) is not None:
            self._by_group.setdefault(request.group, request)
        following = self._rest(request, depth, self._span)
        if following is not None:
            key = (request.cache_salt, depth, following)
            if self._by_prefix.setdefault(key, request) is request:
                self._keys[request.uid] = key

    def end(self, request: Request) -> None:
        """It computes no shared prefix any more: done with its prompt, or gone."""
        key = self._keys.pop(request.uid, None)
        if key is not None:
            del self._by_prefix[key]
        if self._by_group.get(request.group) is request:
            del self._by_group[request.group]

    def should_wait(self, request: Request, depth: int) -> bool:
        """Is somebody computing what follows the request's cached prefix of `depth` tokens?"""
        if not request.uses_cache or request.prompt_logprobs is not None:
            return False
        if self._by_group and request.group in self._by_group and self._rest(request, depth, self._page_size):
            return True
        if not self._by_prefix:
            return False
        following = self._rest(request, depth, self._span)
        if following is None:
            return False
        leader = self._by_prefix.get((request.cache_salt, depth, following))
        end = depth * TOKEN_BYTES
        return leader is not None and leader.tokens[:end] == request.tokens[:end]

    def _rest(self, request: Request, depth: int, span: int) -> bytes | None:
        """The `span` tokens after `depth`, if the request could read these from the cache (or will put them there)."""
        if depth + span > (request.num_tokens - 1) // self._page_size * self._page_size:
            return None
        return bytes(request.tokens[depth * TOKEN_BYTES : (depth + span) * TOKEN_BYTES])
