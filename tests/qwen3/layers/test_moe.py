"""Dispatch that never waits for its device gives what the one that looks gives."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model_worker.fake_device import NothingIsRead
from tests.model_worker.sampling.reference import on_ranks
from tests.qwen3.harness import MOE, load_model, make_checkpoint
from vibe_sgl_lite.qwen3.layers import moe
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, tokens: int) -> None:
    make_checkpoint(tmp_path, MOE)
    x = torch.randn(tokens, MOE["hidden_size"])

    def of_rank(group: Group) -> Tensor:
        parallel = ParallelState(rank=group.rank, tp=group, ep=group)
        block = load_model(tmp_path, parallel=parallel).layers[0].feed_forward
        assert isinstance(block, MoEBlock)
        with torch.inference_mode(), NothingIsRead(allowed=("_local_scalar_dense",) if looking else ()):
            return block(x.clone(), NO_TIMER)

    outputs: list[Sequence[Tensor]] = []
    for looking in (True, False):
        monkeypatch.setattr(moe, "_reads_are_free", lambda _, free=looking: free)
        outputs.append(on_ranks(ranks, of_rank))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    assert outputs[0][0].abs().max() > 0.01


def test_counts_are_those_of_bincount() -> None:
    values = torch.randint(0, 7, (100,))
    assert torch.equal(moe._count(values, 9), torch.bincount(values, minlength=9))
