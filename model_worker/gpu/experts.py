"""Mixtures of experts through the GPU kernels (kernels/experts.py): the host waits for nothing, so graphs take them."""

from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.experts import choose_expert_tiles, route, run_experts
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, Experts, MoEBlock, Router
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer
from vibe_sgl_lite.qwen3.model import Qwen3


class GroupedDispatch(AllReduceDispatch):
    """An `ExpertDispatch`, every rank with every token."""

    def __init__(self, parallel: ParallelState, *, pdl: bool) -> None:
        super().__init__(parallel)
        self.pdl = pdl

    def partial(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        timer.mark("router")
        scores = router.weight.multiply(x)
        weights, ids = route(scores, router.top_k, normalize=router.normalize, pdl=self.pdl)
        timer.mark("experts")
        tiles = choose_expert_tiles(len(x), router.top_k, scores.shape[1], x.dtype)
        matrices = experts.gate_up.tensor, experts.down.tensor
        output = run_experts(x, weights, ids, *matrices, experts.ids.start, tiles, pdl=self.pdl)
        timer.mark(OTHER)
        return output


def plan_experts(model: Qwen3, *, pdl: bool) -> None:
    """Let the experts of `model`, whose weights are loaded, go through the kernels where all ranks have all tokens."""
    for layer in model.layers:
        block = layer.feed_forward
        if isinstance(block, MoEBlock) and isinstance(block.dispatch, AllReduceDispatch):
            block.dispatch = GroupedDispatch(model.parallel, pdl=pdl)
