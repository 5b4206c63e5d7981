"""The dense feed-forward block: SwiGLU with gate and up packed in one matrix."""

from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.layers.setup import Setup
from vibe_sgl_lite.qwen3.steps import Block, Product, SiluMultiply


class MLP:
    """[T, H] -> [T, H]; the intermediate dimension is split over the TP group."""

    def __init__(self, setup: Setup) -> None:
        hidden, intermediate = setup.config.hidden_size, setup.config.intermediate_size
        self.gate_up = ColumnParallelLinear(hidden, 2 * intermediate, setup)
        self.down = RowParallelLinear(intermediate, hidden, setup)
        self.steps: Block = (
            Product("gate_up", self.gate_up),
            SiluMultiply(setup.operations),
            Product("down", self.down),
        )
