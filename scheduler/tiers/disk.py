"""The second tier of the prefix cache: pages on disk (`--cache-dir`), which outlive the engine.

The ranks move the bytes (model_worker/page_files.py), the scheduler knows which pages have files, by their keys
(keys.py): of weights, formats, ranks, cache salt and all tokens from the root.

    radix tree ──stored──▶ queue ──moves──▶ ranks write files ──answers──▶ index, least recently used first
        ▲                                                                     │
        └── insert ◀──answers── ranks read files ◀──moves── wait_for ◀────────┘   bounded: `remove` before `store`

Pages are stored as they enter the tree, a bounded number at a time; one that is evicted before its turn is not. What is
stored displaces what was last used before it was computed, so never its own beginning, without which nobody finds it.
Ranks take messages in order, so a page holds what the tree says when the order to store it comes, whatever follows.

A waiting request whose prefix goes on in the index has it loaded, into pages that belong to nobody meanwhile, below a
locked node of the tree. It waits while that is likely to be faster than computing the same, and never for longer than
that would take. What failed to load is forgotten, and computed.

Knows no files and no clock. Dies with the ranks: the next ones begin with a new one, made from what the folder has.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from vibe_sgl_lite.runtime.messages import Message, PageMoves, PagesMoved, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.page_folder import file_name
from vibe_sgl_lite.scheduler.cost import CostModel, chunk_work
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.radix_cache import TOKEN_BYTES, RadixNode
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.tiers.keys import PageKeys

STORE_BYTES = 64 << 20  # on their way to the files at a time; the ranks hold a copy of them
LOAD_BYTES = 128 << 20  # of one load, so that a request need not wait for more than it must
LOADING_BYTES = 512 << 20  # of all loads at a time
GUESSED_RATE = 500e6  # bytes a second that a rank loads, before any was seen
LOAD_S = 0.002  # a load's way to the ranks and back
PATIENCE_S = 5.0  # for a load, as long as nobody knows what computing the same would take
SEEN_TOKENS = 128  # of a step that tells what long prompts take; what short ones take says little of it
TOUCH_S = 5.0  # between two messages about what was used
REMOVE_AT_ONCE = 256


class TierContents(Message, frozen=True):
    """What the folder has when ranks begin. root: all that the pages' values depend on but tokens and salt.

    page_bytes: that a page's files take, and rank_bytes: that a rank reads of it. limit: bytes of all files. pages:
    (key, bytes, ranks) the least recently used first, also those of other models.
    """

    root: bytes
    ranks: int
    page_bytes: int
    rank_bytes: int
    limit: int
    pages: list[tuple[bytes, int, int]] = msgspec.field(default_factory=list)


class TierCounts(msgspec.Struct):
    """Since the scheduler's start, in pages. failed: loads and stores that came to nothing. restored: from host memory.
    messages: to the ranks that are answered; their numbers. closed: the weights are others than those that the folder's
    root stands for."""

    loaded: int = 0
    stored: int = 0
    evicted: int = 0
    failed: int = 0
    restored: int = 0
    messages: int = 0
    closed: bool = False


class _File(NamedTuple):
    """Of a page. size: of all ranks' files, in bytes. used: when it was last of use, by the tier's own count."""

    size: int
    ranks: int
    used: int


@dataclass
class _Move:
    """What the ranks were asked for. keys: of pages; sizes: what their files take, of those to be removed."""

    kind: str
    keys: list[bytes]
    waiting: int
    failed: set[int] = field(default_factory=set)
    size: int = 0
    # of a load: below which node, which tokens, into which pages
    node: RadixNode | None = None
    tokens: bytes = b""
    pages: array[int] = field(default_factory=lambda: array("i"))


class DiskTier:
    """See the module. A `CacheWatcher` of the radix tree, which is empty when it begins."""

    def __init__(
        self, contents: TierContents, memory: KVMemory, cost: CostModel, counts: TierCounts, epoch: int
    ) -> None:
        assert memory.cache.num_cached == 0
        self._contents = contents
        self._memory = memory
        self._cost = cost
        self._counts = counts
        self._epoch = epoch
        self.problem = ""  # why nothing is stored any more
        self._index = OrderedDict((key, _File(size, ranks, 0)) for key, size, ranks in contents.pages)
        self.used = sum(size for _, size, _ in contents.pages)  # bytes, files being written or removed included
        self._keys = PageKeys(contents.root, memory.page_size)
        self._queue: dict[bytes, tuple[int, int]] = {}  # keys to store: where they are, and since when
        self._doomed: dict[bytes, _File] = {}  # out of the index, and still to be removed
        self._storing: dict[bytes, int] = {}  # since when they are in the tree
        self._loading: set[bytes] = set()
        self._moves: dict[int, _Move] = {}
        self._begun: list[PageMoves] = []
        self._touched: dict[bytes, None] = {}
        self._next_touch = 0.0
        self._uses = 0
        self._rate = GUESSED_RATE

    # ------------------------------------------------------------------------------------------------ the tree's pages

    def stored(self, node: RadixNode) -> None:
        if self._counts.closed:
            return
        self._uses += 1
        for key, page in self._keys.enter(node):
            self._want(key, page)
        walk: RadixNode | None = node
        while walk is not None:
            self._use(walk.pages)
            walk = walk.parent

    def removed(self, pages: Iterable[int]) -> None:
        for page in pages:
            key = self._keys.of.pop(page, None)
            if key is not None:
                self._queue.pop(key, None)

    def cleared(self) -> None:
        """The tree is not what its keys stand for any more, while the ranks live: they have other weights."""
        self._keys.of.clear()
        self._queue.clear()
        self._counts.closed = True

    def used_by(self, request: Request) -> None:
        """A request got its slot and reads these pages."""
        self._uses += 1
        pages = request.pages[: request.num_shared_pages]
        for page in pages:
            if page in self._keys.of:
                self._want(self._keys.of[page], page)  # its file may have been removed meanwhile
        for key in self._use(pages):
            self._touched.pop(key, None)
            self._touched[key] = None

    def _want(self, key: bytes, page: int) -> None:
        """It should have a file."""
        known = key in self._index or key in self._queue or key in self._storing
        if not known and not self.problem and self._contents.page_bytes <= self._contents.limit:
            self._queue[key] = page, self._uses

    def _use(self, pages: Sequence[int]) -> list[bytes]:
        """They count as used now, the end of a prefix before its beginning. Their keys, of those that have files."""
        found = []
        for page in reversed(pages):
            key = self._keys.of.get(page)
            file = None if key is None else self._index.get(key)
            if key is not None and file is not None:
                self._index[key] = file._replace(used=self._uses)
                self._index.move_to_end(key)
                found.append(key)
        return found

    def forget_all(self) -> None:
        """The cache is flushed: the files go too."""
        self._doom(list(self._index))

    # --------------------------------------------------------------------------------------------------------- loading

    def wait_for(self, request: Request, depth: int, room: Callable[[], int], now: float) -> bool:
        """Whether a waiting request, `depth` tokens of which are in the tree, should wait for more to be loaded.

        Begins the load if there is one to begin. room: pages that a newcomer may have.
        """
        page_size = self._memory.page_size
        if self._counts.closed:
            return False
        first, end = depth // page_size, self._memory.readable(request) // page_size
        if first >= end or not self._index or (request.load_depth == depth and now >= request.load_until):
            return False
        keys = self._keys.of_request(request, first, end, self._index)
        if not keys:
            return False
        compute_s = self._compute_s(depth, len(keys) * page_size)
        if keys[0] not in self._loading:
            page_bytes = self._contents.rank_bytes
            backlog = len(self._loading) * page_bytes
            if LOAD_S + (backlog + len(keys) * page_bytes) / self._rate >= compute_s:
                return False
            keys = keys[: max(1, LOAD_BYTES // page_bytes)]
            keys = keys[: next((place for place, key in enumerate(keys) if key in self._loading), None)]
            if backlog == 0 or backlog + len(keys) * page_bytes <= LOADING_BYTES:
                if self._memory.pages_for(request.num_tokens) > room():
                    return False
                self._begin_load(request, depth, keys)
        if request.load_depth != depth:
            request.load_depth = depth
            request.load_until = now + min(compute_s, PATIENCE_S)
        return True

    def _compute_s(self, depth: int, count: int) -> float:
        """Of so many tokens; infinite while nobody knows."""
        if self._cost.largest < min(count, SEEN_TOKENS):
            return math.inf
        return self._cost.added(chunk_work(depth, count))

    def _begin_load(self, request: Request, depth: int, keys: list[bytes]) -> None:
        memory, start, end = self._memory, depth * TOKEN_BYTES, depth + len(keys) * self._memory.page_size
        node, pages = memory.begin_load(request, depth, len(keys))
        move = _Move("load", keys, self._contents.ranks, node=node, pages=pages)
        move.tokens = bytes(request.tokens[start : end * TOKEN_BYTES])
        self._loading.update(keys)
        self._begun.append(self._message(move, load=b"".join(keys), load_pages=pages.tobytes()))

    # --------------------------------------------------------------------------------------------------------- messages

    def has_moves(self, now: float) -> bool:
        """Whether `moves` may have something."""
        touches = bool(self._touched) and now >= self._next_touch
        return bool(self._begun or self._queue or self._doomed) or touches or self.used > self._contents.limit

    def moves(self, now: float) -> list[PageMoves]:
        """What to tell the ranks, before the step that was planned last."""
        moves, self._begun = self._begun, []
        if not any(move.kind == "remove" for move in self._moves.values()):
            self._make_room()
            if self._doomed:
                moves.append(self._remove())
        size, keys, pages = self._contents.page_bytes, [], []
        for key, (page, since) in self._queue.items():
            if key in self._doomed:
                continue  # its old file first
            busy = bool(self._storing) and (len(self._storing) + 1) * size > STORE_BYTES
            if busy or self.used + size > self._contents.limit:
                break
            self.used += size
            self._storing[key] = since
            keys.append(key)
            pages.append(page)
        for key in keys:
            del self._queue[key]
        if keys:
            move = _Move("store", keys, self._contents.ranks)
            moves.append(self._message(move, store=b"".join(keys), store_pages=pack_ids(pages)))
        if self._touched and now >= self._next_touch:
            moves.append(PageMoves(-1, touch=b"".join(self._touched), epoch=self._epoch))
            self._touched.clear()
            self._next_touch = now + TOUCH_S
        return moves

    def answered(self, answer: PagesMoved) -> bool:
        """Take one rank's answer. Returns whether pages were loaded, or given back."""
        move = self._moves.get(answer.number)
        if move is None:
            return False  # of a tier before this one
        move.waiting -= 1
        move.failed.update(unpack_ids(answer.failed))
        if answer.error and not self.problem:
            self.problem = answer.error
            self._queue.clear()
        if move.kind == "load" and answer.seconds > 0:
            rate = len(move.keys) * self._contents.rank_bytes / answer.seconds
            self._rate += 0.3 * (rate - self._rate)
        if move.waiting:
            return False
        del self._moves[answer.number]
        if move.kind == "remove":
            self.used -= move.size
        elif move.kind == "store":
            self._end_store(move)
        else:
            self._end_load(move)
        return move.kind == "load"

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _end_store(self, move: _Move) -> None:
        self._counts.stored += len(move.keys) - len(move.failed)
        self._counts.failed += len(move.failed)
        for place, key in reversed([*enumerate(move.keys)]):
            file = _File(self._contents.page_bytes, self._contents.ranks, self._storing.pop(key))
            if place in move.failed:
                self._doomed[key] = file  # another rank may have it
            else:
                self._index[key] = file

    def _end_load(self, move: _Move) -> None:
        assert move.node is not None
        self._loading.difference_update(move.keys)
        good = min(move.failed, default=len(move.keys))
        self._counts.loaded += good
        self._counts.failed += len(move.failed)
        self._doom([move.keys[place] for place in move.failed])
        step = self._memory.page_size * TOKEN_BYTES
        self._memory.end_load(move.node, move.tokens[: good * step], move.pages, good)

    def _remove(self) -> PageMoves:
        doomed = dict(list(self._doomed.items())[:REMOVE_AT_ONCE])
        for key in doomed:
            del self._doomed[key]
        move = _Move("remove", [], self._contents.ranks, size=sum(file.size for file in doomed.values()))
        names = [file_name(key, rank, file.ranks) for key, file in doomed.items() for rank in range(file.ranks)]
        return self._message(move, remove=names)

    def _make_room(self) -> None:
        """For what came first into the queue, and as much with it; what nothing has to give way to is not stored."""
        size, limit = self._contents.page_bytes, self._contents.limit
        self._doom_oldest(self.used - limit, self._uses + 1)
        while self._queue and not self._doomed:
            first = next(iter(self._queue.values()))[1]
            together = [key for key, (_, since) in self._queue.items() if since == first]
            wanted = min(len(together), max(1, STORE_BYTES // size)) * size
            self._doom_oldest(self.used + wanted - limit, first)
            if self._doomed or self.used + size <= limit:
                return
            for key in together:
                del self._queue[key]

    def _doom_oldest(self, excess: int, before: int) -> None:
        """So many bytes, of what was last used before then."""
        doomed = []
        for key, file in self._index.items():
            if excess <= 0 or file.used >= before:
                break
            if key not in self._loading:
                doomed.append(key)
                excess -= file.size
        self._counts.evicted += len(doomed)
        self._doom(doomed)

    def _doom(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._index:
                self._doomed[key] = self._index.pop(key)
                self._touched.pop(key, None)

    def _message(self, move: _Move, **fields: bytes | list[str]) -> PageMoves:
        number = self._counts.messages
        self._counts.messages += 1
        self._moves[number] = move
        return PageMoves(number, epoch=self._epoch, **fields)  # type: ignore[arg-type]

    @property
    def num_pages(self) -> int:
        """That have files."""
        return len(self._index)
