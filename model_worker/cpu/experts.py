"""Mixtures of experts through the CPU kernels (native/experts.h): all experts of a layer in one call."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.api import DTYPES, CpuKernels
from vibe_sgl_lite.model_worker.cpu.library import structures
from vibe_sgl_lite.model_worker.cpu.linear import SLAB
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, Experts, MoEBlock, Router
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight
from vibe_sgl_lite.qwen3.model import Qwen3


class KernelDispatch(AllReduceDispatch):
    """An `ExpertDispatch`, every rank with every token. Keeps the places of its layer's matrices, not the matrices."""

    def __init__(self, parallel: ParallelState, kernels: CpuKernels, gate_up: Any, down: Any) -> None:
        super().__init__(parallel)
        self._kernels = kernels
        self._gate_up, self._down = gate_up, down

    def partial(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        weights, ids = router(x, timer)
        timer.mark("experts")
        x = x.contiguous()
        out = torch.empty_like(x)
        assert ids.dtype == torch.int64
        assert weights.dtype == x.dtype
        assert ids.is_contiguous()
        assert weights.is_contiguous()
        call = structures()["ExpertsCall"](
            DTYPES[x.dtype],
            ctypes.addressof(self._gate_up),
            ctypes.addressof(self._down),
            experts.count,
            experts.ids.start,
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            len(x),
            router.top_k,
            x.shape[1],
            experts.down.shape[2],
            out.data_ptr(),
        )
        self._kernels.call("ExpertsCall", call)
        timer.mark(OTHER)
        return out


def plan_experts(model: Qwen3, kernels: CpuKernels) -> None:
    """Let the experts of `model`, whose weights are loaded, go through the kernels where these have all their matrices
    and all ranks have all tokens."""
    for layer in model.layers:
        block = layer.feed_forward
        if isinstance(block, MoEBlock) and isinstance(block.dispatch, AllReduceDispatch):
            gate_up, down = _places(block.experts.gate_up), _places(block.experts.down)
            if gate_up is not None and down is not None and block.experts.gate_up.shape[1] % (2 * SLAB) == 0:
                block.dispatch = KernelDispatch(model.parallel, kernels, gate_up, down)


def _places(weight: ExpertWeight) -> Any:
    """An array of the matrices' places; None if one is not of the kernels, or filled up."""
    matrices = [matrix for matrix in weight.matrices if isinstance(matrix, SlabMatrix) and not matrix.padding]
    if len(matrices) < len(weight.matrices):
        return None
    return (structures()["Matrix"] * len(matrices))(*[matrix.weights.place for matrix in matrices])
