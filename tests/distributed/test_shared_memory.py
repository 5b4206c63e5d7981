"""Collectives through memory that the ranks share give what torch.distributed gives, or leave it to it."""

from pathlib import Path

import pytest

from tests.distributed.spawn import run_ranks
from tests.qwen3.harness import DENSE, make_checkpoint

SHAPE = DENSE | {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_memory(tmp_path: Path, world_size: int) -> None:
    """Sums, extremes and gathers as Gloo's, whoever is late; a model's logits as one rank's; and who cannot share."""
    make_checkpoint(tmp_path, SHAPE)
    for rank, wrong in enumerate(run_ranks("tests.distributed.shared_memory_cases:all_cases", world_size, tmp_path)):
        assert not wrong, f"rank {rank}: {wrong}"
