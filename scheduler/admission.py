"""How much memory admission keeps for what running requests have yet to write.

Nobody knows how long an answer gets, so only a share of the remaining output is kept room for. The share falls while
all goes well and jumps up when a request had to be retracted, as in SGLang's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.request import Request

INITIAL_RATIO = 0.7
LOWEST_SHARE = 0.14  # of the initial ratio
DECAY_STEPS = 600
FORESEEN_TOKENS = 4096  # output beyond this is not kept room for
MARGIN_TOKENS = 20  # after a retraction: what every running request shall be able to add at least


class NewTokenRatio:
    """The share of remaining new tokens that admission keeps room for, 0 to 1."""

    def __init__(self, conservativeness: float) -> None:
        self.initial = min(1.0, INITIAL_RATIO * conservativeness)
        self._lowest = LOWEST_SHARE * self.initial
        self._decay = (self.initial - self._lowest) / DECAY_STEPS
        self.value = self.initial

    def decode_step(self) -> None:
        self.value = max(self._lowest, self.value - self._decay)

    def retracted(self, running: Iterable[Request]) -> None:
        """Jump up: to the initial ratio, or to the share of their output that the running ones have shown to need."""
        written = asked = 0
        for request in running:
            written += request.num_generated + MARGIN_TOKENS
            asked += request.sampling.max_new_tokens
        self.value = max(self.value, self.initial, min(1.0, written / asked) if asked else 0.0)

    def idle(self) -> None:
        self.value = self.initial

    def pages_to_come(self, requests: Iterable[Request], memory: KVMemory) -> int:
        """Pages to keep for requests that they do not hold yet: known tokens without KV, and a share of the rest.

        A request whose whole need is reserved has it reserved; the others' is what admission must leave free.
        """
        share, page_size, pages = self.value, memory.page_size, 0
        for request in requests:
            known = request.num_computed_tokens + 1
            if known < request.prefill_end:
                known = request.prefill_end
            rest = request.kv_limit - known
            if rest > FORESEEN_TOKENS:
                rest = FORESEEN_TOKENS
            if not request.reserved_pages:
                more = -(-(known + int(rest * share)) // page_size) - len(request.pages)
                if more > 0:
                    pages += more
        return pages
