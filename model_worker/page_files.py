"""One rank's part of the prefix cache's tier on disk: copies pages between the pool and files (runtime/page_folder.py).

    the rank's loop ── take: copies what is to be stored ──▶ writer thread: stores, removals, touches, in their order
                    └─────────────────────────────────────▶ loader thread: fills pages that nobody uses meanwhile

Each thread answers the scheduler over a socket of its own. What cannot be read is told as failed, and computed. What
cannot be written is told with the reason, and the scheduler asks for no more; answers never suffer.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, ReadBack
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.runtime.messages import PageMoves, PagesMoved, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.page_folder import (
    KEY_BYTES,
    file_name,
    make_new_folder,
    pack_header,
    pages_folder,
    read_page,
    write_page,
)

READERS = 4  # threads: out of memory two cores are busy with two, a device has more to give
CLOSE_S = 1.0  # for what is still to be written when the rank ends

Send = Callable[[PagesMoved], None]


class PageFiles:
    """See the module. Raises OSError when the folder cannot be written to.

    connect: called by each thread, gives what sends its answers.
    """

    def __init__(
        self, folder: Path, pool: KVPool, device: Device, rank: int, ranks: int, connect: Callable[[], Send]
    ) -> None:
        self._pages = pages_folder(folder)
        self._pool = pool
        self._device = device
        self._rank, self._ranks = rank, ranks
        self._new = make_new_folder(folder, rank, ranks)
        with os.scandir(self._pages) as files:
            pool.will_load(sum(1 for _ in files) // ranks)
        self._to_write: SimpleQueue[tuple[PageMoves, ReadBack | None] | None] = SimpleQueue()
        self._to_load: SimpleQueue[tuple[PageMoves, torch.cuda.Event | None]] = SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="page-reader")
        self._broken: BaseException | None = None
        self._writer = threading.Thread(target=self._run, args=(connect, self._write), name="page-writer", daemon=True)
        self._loader = threading.Thread(target=self._run, args=(connect, self._load), name="page-loader", daemon=True)
        self._writer.start()
        self._loader.start()

    def take(self, moves: PageMoves) -> None:
        """Between the steps before and those after it. Raises what a thread has died of."""
        if self._broken is not None:
            raise RuntimeError("a thread that moves pages has failed") from self._broken
        if moves.load:
            self._pool.will_load(max(unpack_ids(moves.load_pages)) + 1)
            self._to_load.put((moves, self._pool.mark()))
        else:
            copies = (
                self._device.read_back([self._pool.copy_of(unpack_ids(moves.store_pages))]) if moves.store else None
            )
            self._to_write.put((moves, copies))

    def close(self) -> None:
        """Give what is still to be written a moment."""
        self._to_write.put(None)
        self._writer.join(CLOSE_S)
        self._readers.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError):
            self._new.rmdir()

    def _run(self, connect: Callable[[], Send], work: Callable[[Send], bool]) -> None:
        try:
            send = connect()
            while work(send):
                pass
        except BaseException as error:
            self._broken = error
            raise

    def _write(self, send: Send) -> bool:
        """The writer's next message; False at the end."""
        next_ = self._to_write.get()
        if next_ is None:
            return False
        moves, copies = next_
        began, failed, error = time.monotonic(), [], ""
        if self._rank == 0:
            for name in moves.remove:
                with contextlib.suppress(OSError):
                    (self._pages / name).unlink()
        keys = _split(moves.store)
        for place, page in enumerate(copies.wait()[0] if copies is not None else ()):
            if not error:
                try:
                    self._store(keys[place], page.data)
                    continue
                except OSError as problem:
                    error = problem.strerror or str(problem)
            failed.append(place)
        now = time.time_ns()
        for order, key in enumerate(_split(moves.touch)):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=(now + order, now + order))
        if moves.number >= 0:
            send(self._answer(moves, failed, began, error))
        return True

    def _store(self, key: bytes, page: memoryview) -> None:
        write_page(self._new, self._path(key), pack_header(key, self._rank, self._ranks, page), page)

    def _load(self, send: Send) -> bool:
        """The loader's next message."""
        moves, mark = self._to_load.get()
        began = time.monotonic()
        pages = unpack_ids(moves.load_pages)
        memory = self._pool.host_memory(pages)

        def read(key: bytes, page: Tensor) -> bool:
            return read_page(self._path(key), key, self._rank, self._ranks, page.numpy().data)

        with self._pool.filling():
            read_well = [*self._readers.map(read, _split(moves.load), memory)]
            self._pool.filled(pages, memory, mark)
        failed = [place for place, good in enumerate(read_well) if not good]
        send(self._answer(moves, failed, began, ""))
        return True

    def _answer(self, moves: PageMoves, failed: list[int], began: float, error: str) -> PagesMoved:
        seconds = time.monotonic() - began
        return PagesMoved(moves.number, self._rank, pack_ids(failed), seconds, error, moves.epoch)

    def _path(self, key: bytes) -> Path:
        return self._pages / file_name(key, self._rank, self._ranks)


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
