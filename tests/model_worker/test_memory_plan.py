"""The pool's size: from memory, from --max-total-tokens, and refused when nothing fits."""

from pathlib import Path

import pytest
import torch

from tests.runtime.settings.test_model_config import DENSE, read
from vibe_sgl_lite.model_worker import memory_plan
from vibe_sgl_lite.model_worker.memory_plan import CPU_LIMIT_BYTES, HEADROOM_BYTES, MemoryPlan, plan_memory
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read(tmp_path, DENSE)


def free(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    """Let so many bytes be free, beside the headroom."""
    limit = Limit(HEADROOM_BYTES + value, "control group /x, limit 77 MiB")
    monkeypatch.setattr(memory_plan, "available_memory", lambda: limit)


def plan(
    config: ModelConfig,
    *,
    fraction: float = 0.5,
    tokens: int | None = None,
    ranks: int = 1,
    weights: int = 0,
    int8: bool = False,
) -> MemoryPlan:
    return plan_memory(
        config,
        Group(),
        page_size=16,
        dtype=torch.float32,
        device=CPU,
        memory_fraction=fraction,
        max_total_tokens=tokens,
        weight_bytes=weights,
        ranks_on_machine=ranks,
        int8=int8,
    )


def pages(
    config: ModelConfig,
    *,
    fraction: float = 0.5,
    tokens: int | None = None,
    ranks: int = 1,
    weights: int = 0,
    int8: bool = False,
) -> int:
    found = plan(config, fraction=fraction, tokens=tokens, ranks=ranks, weights=weights, int8=int8)
    return found.num_pages


def test_int8_makes_the_pool_larger(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 elements of 4 bytes, in fp32 here, against 16 of 1 and a scale of 4."""
    free(monkeypatch, 1 << 50)
    assert pages(config, int8=True) + 1 == (pages(config) + 1) * 64 // 20
    assert pages(config, int8=True, tokens=1000) == 62


def test_asked_for_tokens_decide_alone(config: ModelConfig) -> None:
    assert pages(config, tokens=1000) == 62
    assert pages(config, tokens=16) == 1


def test_free_memory_is_shared_and_capped(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 16 * config.kv_bytes_per_token(1, 4)
    free(monkeypatch, 200 * page_bytes)
    assert pages(config, fraction=0.5) == 99  # one of the 100 is for padding
    assert pages(config, fraction=0.5, ranks=4) == 24
    assert pages(config, fraction=0.5, weights=50 * page_bytes) == 74  # half of 250, less the 50 of the weights
    free(monkeypatch, 1 << 50)
    assert pages(config) == CPU_LIMIT_BYTES // page_bytes - 1


@pytest.mark.parametrize(("tokens", "flag"), [(15, "--max-total-tokens"), (None, "--mem-fraction-static")])
def test_no_room_names_the_flag(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tokens: int | None, flag: str
) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(ConfigError, match=f"limit 77 MiB.*{flag}.*now"):
        pages(config, tokens=tokens)


def test_more_tokens_than_memory(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 16 * config.kv_bytes_per_token(1, 4)
    free(monkeypatch, 100 * page_bytes - HEADROOM_BYTES)
    assert pages(config, tokens=99 * 16) == 99
    with pytest.raises(ConfigError, match=r"--max-total-tokens 1600 .* limit 77 MiB.*at most 1584") as error:
        pages(config, tokens=1600)
    assert error.value.field == "max_total_tokens"
    with pytest.raises(ConfigError, match=r"at most 784"):
        pages(config, tokens=1600, ranks=2)


def test_a_line_tells_limit_weights_pool_and_why(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 3 << 30)
    words = plan(config, weights=1 << 30).words
    for part in ("weights 1.00 GiB", "3.00 GiB free", "limit 77 MiB", "KV pages of 16 tokens", "1.00 GiB (0.5 of it"):
        assert part in words
    assert "\n" not in words
    assert "--max-total-tokens 160" in plan(config, tokens=160).words
    free(monkeypatch, 1 << 40)
    assert "4.00 GiB (the most without --max-total-tokens" in plan(config).words
