"""Mixtures of experts as the CPU kernels take them (native/experts.h)."""

import ctypes
from typing import Any

from vibe_sgl_lite.model_worker.cpu.library import structures
from vibe_sgl_lite.model_worker.cpu.linear import SLAB
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch, MoEBlock
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight


def experts_of(block: MoEBlock) -> Any:
    """The structure of this rank's experts, whose weights are loaded; None where the kernels do not have all of the
    block's matrices, or not every rank has every token."""
    gate_up, down = _places(block.experts.gate_up), _places(block.experts.down)
    router = block.router.weight.matrix
    if gate_up is None or down is None or not isinstance(router, SlabMatrix) or router.padding:
        return None
    if block.experts.gate_up.shape[1] % (2 * SLAB) or not isinstance(block.dispatch, AllReduceDispatch):
        return None
    experts = structures()["Experts"](
        gate_up=ctypes.addressof(gate_up),
        down=ctypes.addressof(down),
        count=block.experts.count,
        first=block.experts.ids.start,
        top_k=block.router.top_k,
        width=block.experts.down.shape[2],
        normalize=block.router.normalize,
    )
    experts.kept = gate_up, down
    return experts


def _places(weight: ExpertWeight) -> Any:
    """An array of the matrices' places; None if one is not of the kernels, or filled up."""
    matrices = [matrix for matrix in weight.matrices if isinstance(matrix, SlabMatrix) and not matrix.padding]
    if len(matrices) < len(weight.matrices):
        return None
    return (structures()["Matrix"] * len(matrices))(*[matrix.weights.place for matrix in matrices])
