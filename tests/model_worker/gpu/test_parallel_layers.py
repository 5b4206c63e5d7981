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
from vibe_sgl_lite.model_worker.gpu import rank_products
from vibe_sgl_lite.model_worker.gpu.attention_backend import AttentionPaths
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Layout, Outbox
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import CHAIN_ROWS, FEW_CHAIN_ROWS
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import choose_tiles
from vibe_sgl_lite.model_worker.gpu.layers import WIDE, plan_layers
from vibe_sgl_lite.model_worker.gpu.parallel_layers import ParallelLayers
from vibe_sgl_lite.model_worker.gpu.rank_products import RankProducts
from vibe_sgl_lite.qwen3.layers import matrix as formats
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight

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
    attention: Any = SimpleNamespace(pdl=False, fixed_order=False, paths=AttentionPaths())
    plan_layers(model, attention)
    assert attention.paths == AttentionPaths(chain_rows=most, narrow=False)  # for which there are no clusters


def test_ranks_whose_products_are_by_clusters_send_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And attention leaves room beside itself for the first boxes of its output's matrix."""
    launched = list[Any]()

    def launch(x: Tensor, matrix: Tensor, output: Tensor, tiles: ClusterTiles, **rest: Any) -> None:
        launched.append((tuple(matrix.shape), tiles.stages, rest["silu"], rest["outbox"] is not None))

    monkeypatch.setattr(rank_products, "has_clusters", lambda device: True)
    monkeypatch.setattr(rank_products, "cluster_product", launch)
    cpu = torch.device("cpu")
    products = RankProducts(TorchOperations(), cpu, pdl=True)
    layout, longs = Layout(1 << 10, 1 << 20, 2), torch.zeros(2, dtype=torch.int64)
    outbox = Outbox(longs, longs, layout, 0)

    def weight(outputs: int, inputs: int) -> MatrixWeight:
        made = MatrixWeight(outputs, inputs, torch.bfloat16, cpu)
        made.replace(PlainMatrix(torch.empty((outputs, inputs), dtype=torch.bfloat16)))
        return made

    qkv, output, gate_up = weight(5120, 5120), weight(5120, 4096), weight(2 * 12_800, 5120)
    x, y = torch.zeros((16, 5120), dtype=torch.bfloat16), torch.zeros((64, 4096), dtype=torch.bfloat16)
    assert products.multiply(x, qkv).shape == (16, 5120)
    part, sent = products.multiply_and_send(y, output, outbox)
    assert sent
    assert part.shape == (64, 5120)
    assert products.multiply_silu(x, gate_up).shape == (16, 12_800)
    assert launched == [
        ((5120, 5120), 12, False, False), ((5120, 4096), 8, False, True), ((25_600, 5120), 6, True, False),
    ]  # fmt: skip
    assert products.sends_by_clusters(output)
    assert not products.sends_by_clusters(weight(4096, 2048))
    assert not RankProducts(TorchOperations(), cpu, pdl=False).sends_by_clusters(output)


def test_narrow_attention_is_of_33_to_64_rows() -> None:
    for rows in (1, 16, 32, 33, 64, 65):
        plain = choose_tiles(rows, 4, torch.bfloat16, 1000)
        narrow = choose_tiles(rows, 4, torch.bfloat16, 1000, narrow=True)
        assert (narrow.keys < plain.keys) == (33 <= rows <= 64)
        assert (narrow == plain) != (33 <= rows <= 64)
