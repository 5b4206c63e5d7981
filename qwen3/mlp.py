"""The dense feed-forward block: SwiGLU with gate and up packed in one matrix."""

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, RowParallelLinear, TokenAttributes
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import PartTimer
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


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

    def __call__(self, x: Tensor, timer: PartTimer, attributes: TokenAttributes | None = None) -> Tensor:
        timer.mark("gate_up")
        gate_up = self.gate_up(x, attributes)
        timer.mark("silu")
        activated = self.operations.silu_multiply(gate_up)
        timer.mark("down")
        return self.down(activated, attributes)
