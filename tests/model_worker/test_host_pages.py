"""Pages to host memory and back, against a plain list of what was where."""

import random

import pytest
import torch

from tests.model_worker.test_page_files import KINDS, make_pool
from vibe_sgl_lite.model_worker import host_pages
from vibe_sgl_lite.model_worker.host_pages import HostPages, host_slots
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.runtime.messages import PageMoves, pack_ids


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_made_in_their_order(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make_pool(kind), most, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("kind", ["bf16", "a GPU's layout"])
def test_copies_are_made_in_their_order_on_a_gpu(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(kind)
    pool.data = pool.data.cuda()
    check(pool, most, monkeypatch)


def check(pool: KVPool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of random copies, in which pages and places come up again and again."""
    rng = random.Random(most)
    monkeypatch.setattr(host_pages, "RUN_BYTES", most * pool.page_bytes)
    memory = HostPages(pool, 3)
    pages = [pool.data[page].clone() for page in range(6)]
    places: list[torch.Tensor | None] = [None] * 3
    for _ in range(20):
        copies: list[int] = []
        for _ in range(rng.randrange(12)):
            slot, page = rng.randrange(3), rng.randrange(6)
            held = places[slot]
            back = held is not None and rng.random() < 0.5
            copies += back, slot, page
            if back and held is not None:
                pages[page] = held
            else:
                places[slot] = pages[page]
        memory.take(PageMoves(-1, host=pack_ids(copies)))
        for page, expected in enumerate(pages):
            assert torch.equal(pool.data[page], expected)
        page = rng.randrange(6)  # a step writes one
        pool.data[page] = rng.randrange(100)
        pages[page] = pool.data[page].clone()


def test_how_many_pages_fit() -> None:
    assert host_slots(1.0, 10_000_000, 1) == 100
    assert host_slots(1.0, 10_000_000, 4) == 25
    assert host_slots(0.001, 10_000_000, 1) == 0
