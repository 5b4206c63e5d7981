"""The dense feed-forward block: SwiGLU with gate and up packed in one matrix."""

import torch

from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.steps import Block, Product, SiluMultiply
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
        self.gate_up = ColumnParallelLinear(
            config.hidden_size, 2 * config.intermediate_size, parallel.tp, dtype, device
        )
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, parallel.tp, dtype, device)

        self.steps: Block = (
            Product("gate_up", self.gate_up),
            SiluMultiply(operations),
            Product("down", self.down),
        )
