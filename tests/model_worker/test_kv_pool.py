"""The pool's size: from memory, from --max-total-tokens, and refused when nothing fits."""

from pathlib import Path

import psutil
import pytest
import torch

from model_worker import kv_pool
from model_worker.kv_pool import CPU_LIMIT_BYTES, KVPool, choose_num_pages
from qwen3.parallel import Group
from runtime.errors import ConfigError
from runtime.model_config import ModelConfig
from tests.runtime.test_model_config import DENSE, read

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read(tmp_path, DENSE)


def pages(
    config: ModelConfig, *, fraction: float = 0.5, tokens: int | None = None, ranks: int = 1, weights: int = 0
) -> int:
    return choose_num_pages(
        config,
        Group(),
        page_size=16,
        dtype=torch.float32,
        device=CPU,
        memory_fraction=fraction,
        max_total_tokens=tokens,
        weight_bytes=weights,
        ranks_on_machine=ranks,
    )


def test_layout_and_padding_page(config: ModelConfig) -> None:
    pool = KVPool(config, 1, num_pages=10, page_size=16, dtype=torch.float32, device=CPU)
    assert pool.data.shape == (4, 2, 11, 16, 2, 16)
    assert pool.padding_page == 10
    pool.data.zero_()
    pool.keys(2)[3, 1].fill_(1)
    pool.values(2)[3, 2].fill_(2)
    assert (pool.data[2, 0, 3, 1] == 1).all()
    assert (pool.data[2, 1, 3, 2] == 2).all()
    assert pool.data.sum() == 2 * 16 + 2 * 2 * 16


def test_asked_for_tokens_decide_alone(config: ModelConfig) -> None:
    assert pages(config, tokens=1000) == 62
    assert pages(config, tokens=16) == 1


def test_free_memory_is_shared_and_capped(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 16 * config.kv_bytes_per_token(1, 4)
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: 200 * page_bytes)
    assert pages(config, fraction=0.5) == 99  # one of the 100 is for padding
    assert pages(config, fraction=0.5, ranks=4) == 24
    assert pages(config, fraction=0.5, weights=50 * page_bytes) == 74  # half of 250, less the 50 of the weights
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: 1 << 50)
    assert pages(config) == CPU_LIMIT_BYTES // page_bytes - 1


@pytest.mark.parametrize(("tokens", "flag"), [(15, "--max-total-tokens"), (None, "--mem-fraction-static")])
def test_no_room_names_the_flag(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tokens: int | None, flag: str
) -> None:
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match=f"{flag}.*now"):
        pages(config, tokens=tokens)


def test_pool_memory_is_committed_only_when_written(config: ModelConfig) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KVPool(config, 1, num_pages=16_000, page_size=16, dtype=torch.float32, device=CPU)
    assert pool.data.nbytes > 200 << 20
    assert process.memory_info().rss - before < 50 << 20
