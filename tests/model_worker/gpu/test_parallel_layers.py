"""Layers whose sums over ranks come with residual and norm give the logits of those in which they are apart."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.cases import steps_logits
from tests.model_worker.sampling.reference import on_ranks
from tests.qwen3.harness import DENSE, MOE, PagedRun, load_model, make_checkpoint
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Outbox
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import CHAIN_ROWS, FEW_CHAIN_ROWS
from vibe_sgl_lite.model_worker.gpu.layers import WIDE, plan_layers
from vibe_sgl_lite.model_worker.gpu.parallel_layers import ParallelLayers
from vibe_sgl_lite.model_worker.gpu.rank_products import RankProducts
from vibe_sgl_lite.qwen3.layers import matrix as formats
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState

LARGEST: int = 20 * DENSE["hidden_size"]  # elements that the peers take: decode rows, not the prompts of `steps_logits`


class ThreadPeers:
    """`FusedSums` of a group whose ranks are threads. called: what was, and how often."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.outbox: Outbox | None = None
        self.called: Counter[str] = Counter()

    def takes(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> bool:
        return operation == dist.ReduceOp.SUM and x.numel() <= LARGEST

    def all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        raise AssertionError("`ThreadGroup.all_reduce` has a way of its own")

    def all_gather(self, x: Tensor) -> None:
        return None

    def all_reduce_add(self, x: Tensor, residual: Tensor, *, sent: bool) -> None:
        assert not sent
        self.called["add"] += 1
        residual.add_(self.group.all_reduce(x))

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, sent: bool) -> None:
        assert not sent
        self.called["add_norm"] += 1
        residual.add_(self.group.all_reduce(x))
        x.copy_(F.rms_norm(residual, weight.shape, weight, eps))


@pytest.mark.parametrize(("shape", "dispatch"), [(DENSE, "all_reduce"), (MOE, "all_reduce"), (MOE, "all_to_all")])
def test_logits_are_those_of_layers_one_by_one(tmp_path: Path, shape: dict[str, Any], dispatch: DispatchKind) -> None:
    make_checkpoint(tmp_path, shape)
    ranks = 1 if dispatch == "all_to_all" else 2  # `ThreadGroup` sends nothing

    def logits(group: Group, *, fused: bool) -> Tensor:
        parallel = ParallelState(rank=group.rank, tp=group, ep=group)
        model = load_model(tmp_path, parallel=parallel, dispatch=dispatch)
        peers = ThreadPeers(group)
        if fused:
            products = RankProducts(model.operations, model.device, pdl=False)
            model.all_layers = ParallelLayers(model.layers, group, peers, model.operations, products)
        with torch.inference_mode():
            result = steps_logits(PagedRun(model))
        layers = len(model.layers)
        sums = layers if dispatch == "all_to_all" else 2 * layers - 1  # the last one has no norm in the layers
        assert peers.called["add_norm"] == (2 * sums if fused else 0)  # two steps of three are small enough
        return result

    one_by_one = on_ranks(ranks, lambda group: logits(group, fused=False))
    fused = on_ranks(ranks, lambda group: logits(group, fused=True))
    for expected, got in zip(one_by_one, fused, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "ranks", "most"), [(WIDE, 2, FEW_CHAIN_ROWS), (WIDE, 1, CHAIN_ROWS), (64, 2, CHAIN_ROWS)]
)
def test_several_ranks_of_a_wide_model_have_a_chain_for_fewer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, ranks: int, most: int
) -> None:
    monkeypatch.setattr(ThreadPeers, "takes", lambda *_: True)
    monkeypatch.setattr(formats, "can_pack", lambda *_: False)  # matrices as a card has them
    make_checkpoint(tmp_path, DENSE | {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 1})
    nobody: Any = object()  # planning meets nobody
    group = Group(0, ranks, nobody if ranks > 1 else None)
    group = replace(group, peers=ThreadPeers(group) if ranks > 1 else None)
    model = load_model(tmp_path, parallel=ParallelState(tp=group, expert_tp=group))
    attention: Any = SimpleNamespace(pdl=False, fixed_order=False, chain_rows=CHAIN_ROWS, has_chain=None)
    plan_layers(model, attention)
    assert attention.has_chain
    assert attention.chain_rows == most
