"""How much memory admission keeps for what running requests have yet to write.

Nobody knows how long an answer gets, so only a share of the remaining output is kept room for. The share falls while
all goes well and jumps up when a request had to be retracted, as in SGLang's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.memory import KVMemory
from scheduler.request import Request

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

    def pages_to_come(self, request: Request, memory: KVMemory) -> int:
        """Pages to keep for a request that it does not hold yet: known tokens without KV, and a share of the rest."""
        if request.guaranteed:
            return memory.pages_for(request.kv_limit) - len(request.pages)
        known = max(request.prefill_end, min(request.num_computed_tokens + 1, request.kv_limit))
        foreseen = min(request.kv_limit - known, FORESEEN_TOKENS) * self.value
        return max(0, memory.pages_for(known + int(foreseen)) - len(request.pages))
