"""One rank's part of the prefix cache's tier in host memory: copies of pages beside a GPU's pool, pinned.

All copies are enqueued on the stream of the steps, in the scheduler's order: a page is saved before a later step writes
it, and is there again before the step that reads it. On a device that works at once they are done at once.
"""

import torch

from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.runtime.messages import PageMoves, unpack_ids

RUN_BYTES = 256 << 20  # that pass through memory of the device at a time


def host_slots(size_gb: float, page_bytes: int, ranks: int) -> int:
    """How many pages fit into host memory of that size, shared by the ranks."""
    return int(size_gb * 10**9) // (page_bytes * ranks)


class HostPages:
    """slots: places for a page. Raises RuntimeError when the memory cannot be had."""

    def __init__(self, pool: KVPool, slots: int) -> None:
        self.slots = slots
        self._pool = pool
        pinned = pool.data.device.type == "cuda"
        self._memory = torch.empty((slots, pool.page_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._most = max(1, RUN_BYTES // pool.page_bytes)

    def take(self, moves: PageMoves) -> None:
        """Enqueue the copies of a message, in runs of the same direction."""
        copies = unpack_ids(moves.host)
        at = 0
        while at < len(copies):
            end, seen = at, set[int]()  # no page twice: which copy comes last would be open
            while end < len(copies) and copies[end] == copies[at] and copies[end + 2] not in seen:
                seen.add(copies[end + 2])
                end += 3
                if len(seen) == self._most:
                    break
            slots, pages = copies[at + 1 : end : 3], copies[at + 2 : end : 3]
            if copies[at]:
                self._pool.fill(pages, [self._memory[slot] for slot in slots])
            else:
                for slot, page in zip(slots, self._pool.copy_of(pages), strict=True):
                    self._memory[slot].copy_(page, non_blocking=True)
            at = end
