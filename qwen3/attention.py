"""Grouped-query attention with per-head RMSNorm on queries and keys, as Qwen3 has it."""

from vibe_sgl_lite.qwen3.layers.linear import QKVLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.layers.setup import Setup
from vibe_sgl_lite.qwen3.steps import Attend, Block, Product


class Attention:
    """One layer's attention block, [T, H] -> [T, H]; heads are split over the TP group."""

    def __init__(self, layer: int, setup: Setup) -> None:
        config = setup.config
        self.qkv = QKVLinear(setup)
        self.query_norm = setup.norm(config.head_dim)
        self.key_norm = setup.norm(config.head_dim)
        self.output = RowParallelLinear(config.num_attention_heads * config.head_dim, config.hidden_size, setup)
        self.steps: Block = (
            Product("qkv", self.qkv),
            Attend(layer, self.query_norm, self.key_norm),
            Product("o", self.output),
        )
