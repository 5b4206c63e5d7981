"""The dense feed-forward block: SwiGLU with gate and up packed in one matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3.linear import ColumnParallelLinear, RowParallelLinear
from qwen3.parallel import ParallelState
from runtime.model_config import ModelConfig


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[..., 2 x I], gate first -> silu(gate) * up, [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class MLP:
    """[T, H] -> [T, H]; the intermediate dimension is split over the TP group."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype, device: torch.device) -> None:
        self.gate_up = ColumnParallelLinear(
            config.hidden_size, 2 * config.intermediate_size, parallel.tp, dtype, device
        )
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, parallel.tp, dtype, device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_multiply(self.gate_up(x)))
