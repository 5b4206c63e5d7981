"""What a decoder layer does, said once: its steps, in order, which run one by one or which a backend compiles.

Legend: T tokens, H hidden size; x is what the step before has left, [T, any width]. A block of steps begins with the
last block's output, [T, H], and ends with its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vibe_sgl_lite.qwen3.attention_backend import ForwardContext
from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations


@dataclass(frozen=True)
class AddNorm:
    """residual += x, [T, H], in place; then the norm of the sum."""

    norm: RMSNorm
    operations: LayerOperations
    part: ClassVar = "norm"  # whose the time is (layers/part_timer.py)

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return self.operations.add_rms_norm(x, residual, self.norm.weight.tensor, self.norm.eps)


@dataclass(frozen=True)
class Product:
    """x times a matrix, and summed over the ranks if the layer is row-parallel."""

    part: str
    linear: ColumnParallelLinear | QKVLinear | RowParallelLinear

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return self.linear(x, context.attributes)


@dataclass(frozen=True)
class Attend:
    """Queries, keys and values -> the heads' outputs: norm, rotation, store and attention."""

    layer: int
    query_norm: RMSNorm
    key_norm: RMSNorm
    part: ClassVar = "attention"

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return context.attention.forward(
            self.layer, x, self.query_norm, self.key_norm, context.angles, context.metadata
        )


@dataclass(frozen=True)
class SiluMultiply:
    """[gate, up] -> silu(gate) * up."""

    operations: LayerOperations
    part: ClassVar = "silu"

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return self.operations.silu_multiply(x)


@dataclass(frozen=True)
class RunExperts:
    """A mixture of experts, [T, H] -> [T, H]."""

    block: MoEBlock
    part: ClassVar = "router"

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return self.block(x, context.timer, context.attributes)


Step = AddNorm | Product | Attend | SiluMultiply | RunExperts
Block = tuple[Step, ...]


def run_block(block: Block, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
    """The steps one after another. x, residual: [T, H]; residual changes in place. Returns [T, H]."""
    for step in block:
        context.timer.mark(step.part)
        x = step(x, residual, context)
    return x
