"""The prefix cache's tier in host memory, behind a GPU's pool (`--hicache-size`): what leaves the pool goes there.

    radix tree ──removed──▶ save: page to slot ──▶ slots, least recently used first
        ▲                                             │
        └────── restore: slot to page ◀───────────────┘   as a request is admitted

Ranks copy in the order of all messages and of the steps between them, on the stream of the steps. So nobody waits for
an answer: a restored page can be read by the step that comes next, and a page that was saved be written by it.

A slot whose page is in the tree again keeps its copy, and is not written anew when that page leaves once more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from vibe_sgl_lite.runtime.messages import PageMoves, pack_ids
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import TOKEN_BYTES, RadixNode
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.tiers.disk import TierCounts
from vibe_sgl_lite.scheduler.tiers.keys import PageKeys

SAVE, RESTORE = 0, 1


class HostTier:
    """See the module. A `CacheWatcher` of the radix tree, which is empty when it begins. Dies with the ranks."""

    def __init__(self, slots: int, memory: KVMemory, counts: TierCounts, epoch: int) -> None:
        self._memory = memory
        self._counts = counts
        self._epoch = epoch
        self._keys = PageKeys(b"host memory", memory.page_size)
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(slots))
        self._copies: list[int] = []  # for the ranks: SAVE or RESTORE, slot, page, and so on
        self._coming: set[bytes] = set()  # about to be restored: not to be displaced by what that displaces

    @property
    def num_pages(self) -> int:
        return len(self._slots)

    def stored(self, node: RadixNode) -> None:
        self._keys.enter(node)

    def removed(self, pages: Iterable[int]) -> None:
        for page in pages:
            key = self._keys.of.pop(page, None)
            if key is None:
                continue
            if key in self._slots:
                self._slots.move_to_end(key)
                continue
            slot = self._free.pop() if self._free else self._displaced()
            if slot is not None:
                self._slots[key] = slot
                self._copies += SAVE, slot, page

    def cleared(self) -> None:
        """The weights are others: what is here is of no use."""
        self._keys.of.clear()
        self.forget_all()

    def forget_all(self) -> None:
        self._free += self._slots.values()
        self._slots.clear()

    def restore(self, request: Request, depth: int) -> None:
        """Bring back what follows the `depth` tokens of a request that are in the tree; the pool has room for it."""
        memory, first = self._memory, depth // self._memory.page_size
        keys = self._keys.of_request(request, first, memory.readable(request) // memory.page_size, self._slots)
        if not keys or memory.pages_for(request.num_tokens) > memory.spare:
            return
        self._coming.update(keys)
        node, pages = memory.begin_load(request, depth, len(keys))
        self._coming.clear()
        for key, page in zip(keys, pages, strict=True):
            self._slots.move_to_end(key)
            self._copies += RESTORE, self._slots[key], page
        end = depth + len(keys) * memory.page_size
        memory.end_load(node, bytes(request.tokens[depth * TOKEN_BYTES : end * TOKEN_BYTES]), pages, len(keys))
        self._counts.restored += len(keys)

    def moves(self) -> list[PageMoves]:
        """What to tell the ranks, before the step that was planned last."""
        copies, self._copies = self._copies, []
        return [PageMoves(-1, host=pack_ids(copies), epoch=self._epoch)] if copies else []

    def _displaced(self) -> int | None:
        """The slot of what was used least recently."""
        for key in self._slots:
            if key not in self._coming:
                return self._slots.pop(key)
        return None
