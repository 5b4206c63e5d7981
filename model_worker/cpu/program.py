"""Runs a model's layers as programs of the CPU kernels (native/program.h), each as many blocks as follow one another.

A program is compiled of the model's own description (qwen3/steps.py). A block whose matrices are all the kernels' is in
one, with the sum over the ranks where these share memory; a sum through torch.distributed ends it. What is in other
formats runs step by step between two programs.
T tokens, H hidden size.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.attention.cpu_backend import KernelAttention
from vibe_sgl_lite.model_worker.cpu.api import DTYPES
from vibe_sgl_lite.model_worker.cpu.experts import experts_of
from vibe_sgl_lite.model_worker.cpu.library import structures
from vibe_sgl_lite.model_worker.cpu.linear import SLAB
from vibe_sgl_lite.model_worker.cpu.shared_memory import SharedMemory
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.model_worker.step_timer import COLLECTIVES
from vibe_sgl_lite.qwen3.attention_backend import AttentionBackend, ForwardContext
from vibe_sgl_lite.qwen3.layers.linear import RowParallelLinear
from vibe_sgl_lite.qwen3.layers.moe import AllReduceDispatch
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.qwen3.steps import AddNorm, Attend, Block, Product, RunExperts, SiluMultiply, run_block


class Kind(IntEnum):
    """Of operations, as native/program.h numbers them."""

    ADD_NORM = 0
    PRODUCT = 1
    GATED_PRODUCT = 2
    ROPE_STORE = 3
    ATTEND = 4
    SUM_RANKS = 5
    ROUTE = 6
    EXPERTS = 7


class Target(IntEnum):
    """Where a product goes."""

    UPDATE = 0
    QKV = 1


class Program:
    """Blocks in one call, with the operations' addresses taken once. Keeps the weights alive. parts: of `seconds`."""

    def __init__(self, blocks: Sequence[Block], backend: KernelAttention, model: Qwen3) -> None:
        self._blocks = blocks
        self._kernels = backend.kernels
        self._compiled = compiled = [operation for block in blocks for operation in _compile(block, backend) or ()]
        ranks = _group(blocks[0]).peers
        self.parts = [part for part, _ in compiled]
        self._operations = (structures()["Operation"] * len(compiled))(*[operation for _, operation in compiled])
        self._seconds: npt.NDArray[np.float64] | None = None
        cache, qkv = backend.caches[0], model.layers[0].attention.qkv
        self._call: Any = structures()["RunProgramCall"](
            dtype=DTYPES[model.dtype],
            operations=ctypes.addressof(self._operations),
            count=len(compiled),
            hidden=model.config.hidden_size,
            heads=qkv.num_heads,
            kv_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            scale=backend.scale,
            eps=model.norm.eps,
            pool=cache.pool,
            ranks=ranks.place if isinstance(ranks, SharedMemory) else structures()["Ranks"](),
        )

    def run(self, update: Tensor, residual: Tensor, context: ForwardContext) -> None:
        """update, residual: [T, H], of the model's dtype, both changed in place."""
        batch: DeviceBatch = context.metadata
        cos, sin, call = context.angles.cos, context.angles.sin, self._call
        assert update.shape == residual.shape == (len(batch.slot_mapping), call.hidden)
        assert DTYPES[update.dtype] == DTYPES[residual.dtype] == DTYPES[cos.dtype] == call.dtype
        assert update.is_contiguous()
        assert residual.is_contiguous()
        assert cos.stride() == sin.stride() == (cos.stride(0), 1)
        assert batch.slot_mapping.dtype == torch.int64
        assert batch.query_start.dtype == batch.context_lengths.dtype == batch.page_table.dtype == torch.int32
        for tensor in (batch.slot_mapping, batch.query_start, batch.context_lengths):
            assert tensor.is_contiguous()
        assert len(batch.query_start) == len(batch.page_table) + 1 == len(batch.context_lengths) + 1
        assert batch.page_table.stride(1) == 1
        call.tokens, call.rows = len(update), len(batch.context_lengths)
        call.update, call.residual = update.data_ptr(), residual.data_ptr()
        call.cos, call.sin, call.angle_stride = cos.data_ptr(), sin.data_ptr(), cos.stride(0)
        call.slots, call.query_start = batch.slot_mapping.data_ptr(), batch.query_start.data_ptr()
        call.context_lengths, call.page_table = batch.context_lengths.data_ptr(), batch.page_table.data_ptr()
        call.page_table_stride = batch.page_table.stride(0)
        if context.timer.measures and self._seconds is None:
            self._seconds = np.zeros(len(self.parts))
            call.seconds = self._seconds.ctypes.data
        self._kernels.call("RunProgramCall", call)
        if self._seconds is not None:
            context.timer.spread(self.parts, self._seconds.tolist)


class ProgramLayers:
    """A `vibe_sgl_lite.qwen3.model.AllLayers` whose metadata is a `DeviceBatch`."""

    def __init__(self, pieces: list[Program | Block | Group]) -> None:
        self.pieces = pieces

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        for piece in self.pieces:
            if isinstance(piece, Program):
                update = update.contiguous()
                piece.run(update, residual, context)
            elif isinstance(piece, Group):
                context.timer.mark(COLLECTIVES)
                update = piece.all_reduce(update)
            else:
                update = run_block(piece, update, residual, context)
        return update


def plan_programs(model: Qwen3, backend: AttentionBackend) -> None:
    """Give `model`, whose weights are loaded, programs, if there are any for it."""
    if not isinstance(backend, KernelAttention):
        return
    pieces: list[Program | Block | Group] = []
    together: list[Block] = []

    def end_program() -> None:
        if together:
            pieces.append(Program(tuple(together), backend, model))
            together.clear()

    for layer in model.layers:
        for block in layer.blocks:
            if _compile(block, backend) is None:
                end_program()
                pieces.append(block)
                continue
            together.append(block)
            group = _group(block)
            if group.size > 1 and not isinstance(group.peers, SharedMemory):
                end_program()
                pieces.append(group)
    end_program()
    if any(isinstance(piece, Program) for piece in pieces):
        model.all_layers = ProgramLayers(pieces)


def _group(block: Block) -> Group:
    """The ranks that sum a block's output."""
    last = block[-1]
    if isinstance(last, RunExperts):
        assert isinstance(last.block.dispatch, AllReduceDispatch)
        return last.block.dispatch.group
    assert isinstance(last, Product)
    assert isinstance(last.linear, RowParallelLinear)
    return last.linear.group


def _compile(block: Block, backend: KernelAttention) -> list[tuple[str, Any]] | None:
    """The operations of a block, each with the part that its time is; None if the kernels do not have them all."""
    made = structures()["Operation"]
    operations: list[tuple[str, Any]] = []
    for place, step in enumerate(block):
        following = block[place + 1] if place + 1 < len(block) else None
        if isinstance(step, AddNorm):
            operations.append((step.part, made(kind=Kind.ADD_NORM, weight=step.norm.weight.tensor.data_ptr())))
        elif isinstance(step, Product):
            matrix = step.linear.weight.matrix
            if not isinstance(matrix, SlabMatrix) or matrix.padding:
                return None
            kind = Kind.PRODUCT
            if isinstance(following, SiluMultiply):
                kind = Kind.GATED_PRODUCT
                if matrix.weights.outputs % (2 * SLAB):
                    return None
            target = Target.QKV if isinstance(following, Attend) else Target.UPDATE
            operations.append((step.part, made(kind=kind, target=target, matrix=matrix.weights.place)))
        elif isinstance(step, Attend):
            pool = backend.caches[step.layer].pool
            weights = {
                "weight": step.query_norm.weight.tensor.data_ptr(),
                "second_weight": step.key_norm.weight.tensor.data_ptr(),
            }
            places = {"keys": pool.keys, "values": pool.values}
            operations.append(("rope", made(kind=Kind.ROPE_STORE, **weights, **places)))
            operations.append((step.part, made(kind=Kind.ATTEND, **places)))
        elif isinstance(step, RunExperts):
            experts = experts_of(step.block)
            if experts is None:
                return None
            matrix = step.block.router.weight.matrix
            assert isinstance(matrix, SlabMatrix)
            operations.append(("router", made(kind=Kind.ROUTE, matrix=matrix.weights.place)))
            operations.append(("experts", made(kind=Kind.EXPERTS)))
            for _, operation in operations[-2:]:
                operation.experts, operation.kept = ctypes.addressof(experts), experts
        else:
            assert isinstance(step, SiluMultiply)
    if isinstance(_group(block).peers, SharedMemory):
        operations.append((COLLECTIVES, made(kind=Kind.SUM_RANKS)))
    return operations
