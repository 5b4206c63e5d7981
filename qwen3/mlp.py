"""The dense feed-forward block: SwiGLU with gate and up packed in one matrix."""

import torch
from torch import Tensor

from qwen3.linear import ColumnParallelLinear, RowParallelLinear
from qwen3.operations import LayerOperations
from qwen3.parallel import ParallelState
from runtime.model_config import ModelConfig


class MLP:
    """[T, H] -> [T, H]; the intermediate dimension is split over the TP group."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        operations: LayerOperations,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.operations = operations
        self.gate_up = ColumnParallelLinear(
            config.hidden_size, 2 * config.intermediate_size, parallel.tp, dtype, device
        )
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, parallel.tp, dtype, device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.operations.silu_multiply(self.gate_up(x)))
