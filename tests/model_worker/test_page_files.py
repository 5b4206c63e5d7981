"""Pages of a real pool through real files and threads; and a process that is killed while it writes."""

import os
import random
import signal
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from tests.model_worker.fake_device import Clock, FakeDevice
from tests.runtime.settings.test_model_config import DENSE, read
from vibe_sgl_lite.model_worker.device import CpuDevice, Device
from vibe_sgl_lite.model_worker.kv_pool import KVLayout, KVPool
from vibe_sgl_lite.model_worker.page_files import PageFiles
from vibe_sgl_lite.runtime.messages import PageMoves, PagesMoved, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.page_folder import FolderClaim, file_bytes, list_pages, pages_folder, read_page
from vibe_sgl_lite.scheduler.cost import CostModel
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.tiers.disk import DiskTier, TierContents, TierCounts

LIMIT_S = 30
CPU = torch.device("cpu")
KINDS: dict[str, tuple[torch.dtype, bool, KVLayout, Device]] = {
    "fp32": (torch.float32, False, KVLayout.PAGES, CpuDevice()),
    "bf16": (torch.bfloat16, False, KVLayout.PAGES, CpuDevice()),
    "int8": (torch.bfloat16, True, KVLayout.PAGES, CpuDevice()),
    "a GPU's layout": (torch.bfloat16, False, KVLayout.LAYERS, CpuDevice()),
    "behind the host's back": (torch.bfloat16, False, KVLayout.LAYERS, FakeDevice(Clock())),
}


def make_pool(kind: str = "fp32") -> KVPool:
    dtype, int8, layout, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        config = read(Path(folder), DENSE)
    pool = KVPool(config, 1, 6, 4, dtype, CPU, int8=int8, layout=layout)
    pool.data.copy_(torch.randint(-100, 100, pool.data.shape))
    return pool


def keys(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(32, "big") for number in numbers)


class Files:
    """Page files with their answers."""

    def __init__(self, folder: Path, pool: KVPool, device: Device) -> None:
        self.folder = folder
        self.answers: SimpleQueue[PagesMoved] = SimpleQueue()
        self.files = PageFiles(folder, pool, device, 0, 1, lambda: self.answers.put)

    def move(self, moves: PageMoves) -> PagesMoved:
        self.files.take(moves)
        return self.answers.get(timeout=LIMIT_S)


@contextmanager
def opened(folder: Path, pool: KVPool, kind: str = "fp32") -> Iterator[Files]:
    with FolderClaim(str(folder)):
        files = Files(folder, pool, KINDS[kind][3])
        yield files
        files.files.close()


@pytest.mark.parametrize("kind", KINDS)
def test_pages_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    pool = make_pool(kind)
    before = pool.data.clone()
    with opened(tmp_path, pool, kind) as files:
        answer = files.move(PageMoves(7, store=keys(1, 2), store_pages=pack_ids([3, 0]), epoch=5))
        assert (answer.number, answer.rank, answer.failed, answer.error, answer.epoch) == (7, 0, b"", "", 5)
    pool.data.zero_()
    with opened(tmp_path, pool, kind) as files:
        answer = files.move(PageMoves(1, load=keys(1, 9, 2), load_pages=pack_ids([5, 4, 1])))
        assert unpack_ids(answer.failed) == [1], "there is no page 9"
        assert answer.seconds > 0
    assert torch.equal(pool.data[5], before[3])
    assert torch.equal(pool.data[1], before[0])
    assert not pool.data[[0, 2, 3]].any()


def test_what_is_stored_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    pool = make_pool()
    before = pool.data[2].clone()
    with opened(tmp_path, pool) as files:
        files.files.take(PageMoves(1, store=keys(1), store_pages=pack_ids([2])))
        pool.data[2].zero_()
        files.answers.get(timeout=LIMIT_S)
        files.move(PageMoves(2, load=keys(1), load_pages=pack_ids([3])))
    assert torch.equal(pool.data[3], before)


def test_memory_for_what_may_be_loaded_is_made_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, told = make_pool(), list[int]()
    monkeypatch.setattr(pool, "will_load", told.append)
    for _ in range(2):
        with opened(tmp_path, pool) as files:
            files.move(PageMoves(1, store=keys(1, 2, 3), store_pages=pack_ids([0, 1, 2])))
            files.move(PageMoves(2, load=keys(3, 1), load_pages=pack_ids([4, 3])))
    assert told == [0, 5, 3, 5]


def test_removals_touches_and_closing(tmp_path: Path) -> None:
    pool = make_pool()
    with opened(tmp_path, pool) as files:
        files.move(PageMoves(1, store=keys(1, 2, 3), store_pages=pack_ids([0, 1, 2])))
        gone = next(pages_folder(tmp_path).glob(f"{keys(2).hex()}*")).name
        files.move(PageMoves(2, remove=[gone, "was.never-there"]))
        files.files.take(PageMoves(-1, touch=keys(3, 1)))
        files.files.take(PageMoves(3, store=keys(4), store_pages=pack_ids([5])))
        files.files.close()  # what is on its way is still written
    assert [page.key for page in list_pages(tmp_path, lambda: None)][:2] == [keys(3), keys(1)]
    assert {page.key for page in list_pages(tmp_path, lambda: None)} == {keys(1), keys(3), keys(4)}
    assert [path.name for path in tmp_path.glob("new.*")] == []


def test_a_folder_that_is_gone_is_told_and_harms_nobody(tmp_path: Path) -> None:
    pool = make_pool()
    with opened(tmp_path / "cache", pool) as files:
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        answer = files.move(PageMoves(1, store=keys(1, 2), store_pages=pack_ids([0, 1])))
        assert (unpack_ids(answer.failed), answer.error) == ([0, 1], "No such file or directory")
        answer = files.move(PageMoves(2, load=keys(1), load_pages=pack_ids([0])))
        assert (unpack_ids(answer.failed), answer.error) == ([0], "")


# ------------------------------------------------------------------------------------------------- killed while writing

KILLS = int(os.environ.get("PAGE_FILES_KILLS", "3"))
LIMIT_PAGES = 20


def write_for_ever(folder: Path, seed: int) -> None:
    """An engine without a model: a tree that gets new prefixes, its tier and its files. A page is full of its key."""
    rng = random.Random(seed)
    pool = make_pool()
    memory = KVMemory(6, 4)
    size = file_bytes(pool.page_bytes)
    found = [(page.key, page.size, page.ranks) for page in list_pages(folder, lambda: None)]
    answers: SimpleQueue[PagesMoved] = SimpleQueue()
    files = PageFiles(folder, pool, CpuDevice(), 0, 1, lambda: answers.put)
    contents = TierContents(b"root", 1, size, pool.page_bytes, LIMIT_PAGES * size, found)
    tier = DiskTier(contents, memory, CostModel(16.0), TierCounts(), 0)
    memory.cache.watchers.append(tier)
    while True:
        count = rng.randint(1, 5)
        memory.cache.evict(6)
        pages = array("i", memory.allocator.allocate(count))
        node, _ = memory.cache.match("", b"", 0)
        memory.cache.insert(node, rng.randbytes(16 * count), pages)
        for page in pages:
            memory_of = pool.data[page].view(-1).view(torch.uint8).numpy().data
            memory_of[:] = (tier._keys.of[page] * (len(memory_of) // 32 + 1))[: len(memory_of)]
        for moves in tier.moves(0.0):
            files.take(moves)
        while tier._moves and (rng.random() < 0.9 or tier.has_moves(0.0)):
            tier.answered(answers.get(timeout=LIMIT_S))
            for moves in tier.moves(0.0):
                files.take(moves)


def test_killed_while_writing_any_page_is_whole_and_the_bound_holds(tmp_path: Path) -> None:
    """PAGE_FILES_KILLS=200 for more."""
    rng, kept, bound = random.Random(0), 0, 0
    with FolderClaim(str(tmp_path)):
        for kill in range(KILLS):
            before = {*pages_folder(tmp_path).iterdir()}
            pid = os.fork()
            if pid == 0:
                try:
                    write_for_ever(tmp_path, kill)
                finally:
                    os._exit(1)
            deadline = time.monotonic() + LIMIT_S
            while {*pages_folder(tmp_path).iterdir()} == before:  # it has begun to write
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

            size = file_bytes(make_pool().page_bytes)
            bound = LIMIT_PAGES * size
            used = [path.stat().st_size for path in tmp_path.glob("*/*") if path.parent.name != "digests"]
            assert sum(-(-part // 4096) * 4096 for part in used) <= bound
            for page in list_pages(tmp_path, lambda: None):
                kept += 1
                content = bytearray(make_pool().page_bytes)
                path = pages_folder(tmp_path) / f"{page.key.hex()}.0-1"
                assert read_page(path, page.key, 0, 1, memoryview(content)), "a page that is listed is not whole"
                assert bytes(content) == (page.key * (len(content) // 32 + 1))[: len(content)]
    assert kept
