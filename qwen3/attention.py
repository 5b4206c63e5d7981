"""Grouped-query attention with per-head RMSNorm on queries and keys, as Qwen3 has it."""

import torch

from vibe_sgl_lite.qwen3.layers.linear import QKVLinear, RowParallelLinear
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.steps import Attend, Block, Product
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


class Attention:
    """One layer's attention block, [T, H] -> [T, H]; heads are split over the TP group."""

    def __init__(
        self, layer: int, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.qkv = QKVLinear(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            parallel.tp,
            dtype,
            device,
        )
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
        self.output = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, parallel.tp, dtype, device
        )

        self.steps: Block = (
            Product("qkv", self.qkv),
            Attend(layer, self.query_norm, self.key_norm),
            Product("o", self.output),
        )
