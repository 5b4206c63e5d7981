"""Mixtures of experts through the GPU kernels (kernels/experts.py): the host waits for nothing, so graphs take them."""

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.block_experts import BlockExperts
from vibe_sgl_lite.model_worker.gpu.kernels.experts import choose_expert_tiles, route, run_experts
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, AllToAllDispatch, Experts, MoEBlock, Router
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer
from vibe_sgl_lite.qwen3.model import Qwen3


class GroupedDispatch(AllReduceDispatch):
    """An `ExpertDispatch`, every rank with every token."""

    def __init__(self, parallel: ParallelState, *, pdl: bool) -> None:
        super().__init__(parallel)
        self.pdl = pdl

    def partial(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        weights, ids = _choose(x, router, timer, pdl=self.pdl)
        return _run(x, weights, ids, router, experts, timer, pdl=self.pdl)


class FixedDispatch(AllToAllDispatch):
    """An `ExpertDispatch` that sends tokens to the ranks of their experts in buffers of one size, which no host reads.

    A token goes to a rank once, with all that it chose, and what that rank's experts make of it comes back added up. So
    a rank has no more for another than its part of the tokens: with so many places none is ever left out.
    """

    def __init__(self, parallel: ParallelState, *, pdl: bool) -> None:
        super().__init__(parallel)
        self.pdl = pdl

    def __call__(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        (tokens, hidden), ranks, top_k = x.shape, self.ep.size, router.top_k
        part = -(-tokens // ranks)
        mine = x.new_zeros((part, hidden))
        here = x[self.ep.rank * part : (self.ep.rank + 1) * part]  # shorter or empty on the last ranks
        mine[: len(here)] = here
        weights, ids = _choose(mine, router, timer, pdl=self.pdl)
        packed, each = torch.cat([mine, weights, ids.view(x.dtype)], dim=1), [part] * ranks
        received = self.ep.all_to_all(packed.repeat(ranks, 1), each, each)
        rows, weights, ids = (t.contiguous() for t in received.tensor_split((hidden, hidden + top_k), dim=1))
        partial = _run(rows, weights, ids.view(torch.int32), router, experts, timer, pdl=self.pdl)
        returned = self.ep.all_to_all(partial, each, each).view(ranks, part, hidden)
        output = self.expert_tp.all_reduce(returned.sum(0, dtype=torch.float32).to(x.dtype))
        return self.ep.all_gather(output)[:tokens]


def _choose(x: Tensor, router: Router, timer: PartTimer, *, pdl: bool) -> tuple[Tensor, Tensor]:
    timer.mark("router")
    chosen = route(router.weight.multiply(x), router.top_k, normalize=router.normalize, pdl=pdl)
    timer.mark(OTHER)
    return chosen


def _run(
    x: Tensor, weights: Tensor, ids: Tensor, router: Router, experts: Experts, timer: PartTimer, *, pdl: bool
) -> Tensor:
    timer.mark("experts")
    tiles = choose_expert_tiles(len(x), router.top_k, router.weight.shape[0], x.dtype)
    gate_up, down = experts.gate_up.stack, experts.down.stack
    if isinstance(gate_up, BlockExperts) and isinstance(down, BlockExperts):
        matrices, scales = (gate_up.codes, down.codes), (gate_up.scales, down.scales)
    else:
        matrices, scales = (experts.gate_up.tensor, experts.down.tensor), None
    output = run_experts(x, weights, ids, *matrices, experts.ids.start, tiles, pdl=pdl, scales=scales)
    timer.mark(OTHER)
    return output


def plan_experts(model: Qwen3, *, pdl: bool) -> None:
    """Let the experts of `model`, whose weights are loaded, go through the kernels."""
    for layer in model.layers:
        block = layer.feed_forward
        if isinstance(block, MoEBlock):
            sends = isinstance(block.dispatch, AllToAllDispatch)
            block.dispatch = (FixedDispatch if sends else GroupedDispatch)(model.parallel, pdl=pdl)
