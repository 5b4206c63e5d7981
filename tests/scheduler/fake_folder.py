"""A folder of `--cache-dir` and the ranks' threads on it, in memory: slow, out of order, failing, and never trusted.

Each rank has a writer, which does stores, removals and touches in their order, and a loader, which does loads; what
comes of them is told when the test says so. A page that is being loaded holds anything until then.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from vibe_sgl_lite.runtime.messages import PageMoves, PagesMoved, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.page_folder import KEY_BYTES
from vibe_sgl_lite.scheduler.tiers.disk import TierContents

GARBAGE = -2  # what is in a page that nobody has filled
Content = list[int | None]


def split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


@dataclass
class FakeFolder:
    """limit: in pages, 0 for no folder; host_slots: of host memory beside it, 0 for none. failing: how often, at
    random, a store or a load fails. files: by name, the oldest first."""

    rng: random.Random
    limit: int = 8
    ranks: int = 1
    failing: float = 0.0
    page_bytes: int = 8192
    host_slots: int = 0
    root: bytes = b"root"
    files: dict[str, Content] = field(default_factory=dict)
    meanings: dict[bytes, Content] = field(default_factory=dict)  # what each key has ever stood for

    def contents(self) -> TierContents:
        """As `list_pages` finds it: whole pages alone, the others' files are removed."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            found.setdefault(name.split(".")[0], []).append(name)
        for key, names in list(found.items()):
            if len(names) < self.ranks:
                for name in names:
                    del self.files[name]
                del found[key]
        size = self.page_bytes
        pages = [(bytes.fromhex(key), size, self.ranks) for key in found]
        return TierContents(self.root, self.ranks, size, size // self.ranks, self.limit * size, pages)

    def write(self, name: str, content: Content) -> None:
        self.files.pop(name, None)
        self.files[name] = content
        assert len(self.files) <= self.limit * self.ranks, "the folder is over its bound"

    def touch(self, name: str) -> None:
        if name in self.files:
            self.files[name] = self.files.pop(name)

    def lose_some(self) -> None:
        """Somebody removes files."""
        for name in [name for name in self.files if self.rng.random() < 0.5]:
            del self.files[name]


class FakeMover:
    """One rank's two threads. pages: of its pool; other ranks than the first only have files."""

    def __init__(self, folder: FakeFolder, rank: int, pages: list[Content], epoch: int) -> None:
        self._folder, self._rank, self._pages, self._epoch = folder, rank, pages, epoch
        self._writer: deque[tuple[PageMoves, list[Content]]] = deque()
        self._loader: deque[PageMoves] = deque()
        self._host: dict[int, Content] = {}

    def take(self, moves: PageMoves) -> None:
        """In the order of all messages: what is to be stored is copied now."""
        assert moves.epoch == self._epoch
        if moves.host:
            ops = unpack_ids(moves.host) if self._rank == 0 else []
            for kind, slot, page in zip(ops[::3], ops[1::3], ops[2::3], strict=True):
                if kind == 0:
                    assert not {None, GARBAGE, -1} & {*self._pages[page]}, "a page that is not whole is saved"
                    self._host[slot] = list(self._pages[page])
                else:
                    self._pages[page][:] = self._host[slot]
        elif moves.load:
            self._loader.append(moves)
            for page in unpack_ids(moves.load_pages):
                self._pages[page][:] = [GARBAGE] * len(self._pages[page])
        else:
            copies = [list(self._pages[page]) for page in unpack_ids(moves.store_pages)]
            if self._rank == 0:
                for key, copy in zip(split(moves.store), copies, strict=True):
                    assert self._folder.meanings.setdefault(key, copy) == copy, "a key stands for two contents"
                    assert not {None, GARBAGE, -1} & {*copy}, "a page that is not whole is stored"
            self._writer.append((moves, copies))

    def threads(self) -> Iterator[bool]:
        """Those that have something to do: whether it is the loader."""
        yield from [False] * bool(self._writer) + [True] * bool(self._loader)

    def work(self, loader: bool) -> PagesMoved | None:
        """One of its threads does its next message."""
        folder = self._folder
        if loader:
            moves = self._loader.popleft()
            failed = [place for place, key in enumerate(split(moves.load)) if not self._read(key)]
            if self._rank == 0:
                for place, (key, page) in enumerate(zip(split(moves.load), unpack_ids(moves.load_pages), strict=True)):
                    if place not in failed:
                        self._pages[page][:] = folder.files[self._name(key)]
            return PagesMoved(moves.number, self._rank, pack_ids(failed), epoch=self._epoch)
        moves, copies = self._writer.popleft()
        failed = []
        for place, (key, copy) in enumerate(zip(split(moves.store), copies, strict=True)):
            if folder.rng.random() < folder.failing:
                failed.append(place)
            else:
                folder.write(self._name(key), copy)
        if self._rank == 0:
            for name in moves.remove:
                folder.files.pop(name, None)
        for key in split(moves.touch):
            folder.touch(self._name(key))
        return None if moves.number < 0 else PagesMoved(moves.number, self._rank, pack_ids(failed), epoch=self._epoch)

    def _read(self, key: bytes) -> bool:
        return self._name(key) in self._folder.files and self._folder.rng.random() >= self._folder.failing

    def _name(self, key: bytes) -> str:
        return f"{key.hex()}.{self._rank}-{self._folder.ranks}"


def over_the_wire(moves: PageMoves) -> PageMoves:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(moves), type=PageMoves)
