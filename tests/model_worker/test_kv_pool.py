"""The pool's layout, and memory that is committed as it is used."""

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.model_worker.cpu.test_commit_ahead import resident_bytes
from tests.runtime.settings.test_model_config import DENSE, read
from vibe_sgl_lite.model_worker import kv_pool
from vibe_sgl_lite.model_worker.kv_pool import KVPool, bytes_per_token
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read(tmp_path, DENSE)


def test_layout_and_padding_page(config: ModelConfig) -> None:
    pool = KVPool(config, 1, num_pages=10, page_size=16, dtype=torch.float32, device=CPU)
    assert pool.data.shape == (11, 4, 2, 16, 2, 16)
    assert pool.padding_page == 10
    pool.data.zero_()
    pool.keys(2)[3, 1].fill_(1)
    pool.values(2)[3, 2].fill_(2)
    assert (pool.data[3, 2, 0, 1] == 1).all()
    assert (pool.data[3, 2, 1, 2] == 2).all()
    assert pool.data.sum() == 2 * 16 + 2 * 2 * 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("ranks", "setting", "value", "ready_mib"),
    [
        (1, "PIECE_BYTES", 1 << 20, 8),
        (4, "READY_LIMIT_BYTES", 12 << 20, 3),
        (4, "available_memory", lambda: Limit(32 * 12 << 20, "a test"), 3),
    ],
)
def test_the_first_tokens_memory_is_made_ready(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, ranks: int, setting: str, value: Any, ready_mib: int
) -> None:
    """All of READY_TOKENS, or this rank's share of the limit or of what is free."""
    mib = 1 << 20
    monkeypatch.setattr(kv_pool, "PIECE_BYTES", mib // 2)
    monkeypatch.setattr(kv_pool, setting, value)
    pool = KVPool(config, 1, num_pages=4096, page_size=16, dtype=torch.float32, device=CPU)  # 1 KiB a token
    assert pool.data.nbytes > 64 * mib
    beats: list[None] = []
    before = resident_bytes()
    pool.make_ready(ranks, lambda: beats.append(None))
    grown = resident_bytes() - before
    assert (ready_mib - 3) * mib < grown < (ready_mib + 5) * mib  # huge pages, and the room that is kept ahead
    assert len(beats) == (8 if setting == "PIECE_BYTES" else 6)
    assert (pool.data.view(-1)[: ready_mib * mib // 4] == 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_rest_of_it_is_made_ready_in_idle_moments(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no time before the first requests."""
    mib = 1 << 20
    monkeypatch.setattr(kv_pool, "PIECE_BYTES", mib // 2)
    monkeypatch.setattr(kv_pool, "READY_SECONDS", -1.0)
    monkeypatch.setattr(kv_pool, "READY_TOKENS", 64 << 10)
    pool = KVPool(config, 1, num_pages=8192, page_size=16, dtype=torch.float32, device=CPU)  # 1 KiB a token
    before = resident_bytes()
    pool.will_use(0)
    beats: list[None] = []
    pool.make_ready(1, lambda: beats.append(None))
    assert len(beats) == 1
    time.sleep(0.2)
    assert resident_bytes() - before < 8 * mib
    pool.idle()
    deadline = time.monotonic() + 20
    while resident_bytes() - before < 61 * mib:
        assert time.monotonic() < deadline, "not ready"
        time.sleep(0.01)


@pytest.mark.parametrize(("tp_size", "heads"), [(1, 2), (2, 1), (4, 1)])
def test_int8_layout(config: ModelConfig, tp_size: int, heads: int) -> None:
    """A page is one piece: codes and scales fill it, and neither reaches into another page."""
    pool = KVPool(config, tp_size, num_pages=10, page_size=4, dtype=torch.bfloat16, device=CPU, int8=True)
    assert pool.data.shape == (11, 4, 2, 4 * heads * (16 + 4))
    assert pool.data[0].nbytes == 4 * bytes_per_token(config, tp_size, torch.bfloat16, int8=True)
    pool.data.zero_()
    for part, elements, scales in (
        (0, pool.keys(2), pool.key_scales(2)),
        (1, pool.values(2), pool.value_scales(2)),
    ):
        assert scales is not None
        assert (elements.dtype, elements.shape) == (torch.int8, (11, 4, heads, 16))
        assert (scales.dtype, scales.shape) == (torch.float32, (11, heads, 4))
        elements[3].fill_(1)
        assert scales.eq(0).all()
        scales[3].fill_(1.5)
        assert elements[3].eq(1).all()
        assert (pool.data[3, 2, part] != 0).sum() == 4 * heads * (16 + 2), "two bytes of 1.5 are zero"
        assert (pool.data[[2, 4], 2, part] == 0).all()
        pool.data[3, 2, part].zero_()
        assert scales.eq(0).all()
    assert not pool.data.any()
    assert KVPool(config, 1, 10, 4, torch.float32, CPU).key_scales(0) is None


def test_pool_memory_is_committed_only_when_written(config: ModelConfig) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KVPool(config, 1, num_pages=48_000, page_size=16, dtype=torch.float32, device=CPU)
    assert pool.data.nbytes > 700 << 20
    assert process.memory_info().rss - before < 10 << 20
    pool.data[20_000:20_100] = 1.0
    assert process.memory_info().rss - before < 15 << 20  # of it 1 MiB is the start, made ready meanwhile
    assert pool.data[20_099, 3, 1].eq(1).all()
    assert pool.data[20_100, 3, 1].eq(0).all()


def test_pool_memory_is_given_back(config: ModelConfig) -> None:
    process = psutil.Process()
    pool = KVPool(config, 1, num_pages=12_000, page_size=16, dtype=torch.bfloat16, device=CPU)
    pool.data.fill_(1.0)
    keys = pool.keys(0)
    full = process.memory_info().rss
    size = pool.data.nbytes
    del pool
    assert keys[-1].eq(1).all()  # a view keeps it
    del keys
    deadline = time.monotonic() + 30.0  # the thread that commits ahead may hold it a little longer
    while process.memory_info().rss >= full - size * 0.9:
        assert time.monotonic() < deadline, "the pool's memory is still there"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="Linux with huge pages")
def test_pool_asks_for_huge_pages(config: ModelConfig) -> None:
    pool = KVPool(config, 1, num_pages=4_000, page_size=16, dtype=torch.float32, device=CPU)
    address = pool.data.data_ptr()
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = rest
    assert "hg" in flags.split()
