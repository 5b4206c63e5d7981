"""Attention over the paged pool through the CPU kernels: norm, rotation and store in one call, attention in another."""

from torch import Tensor

from vibe_sgl_lite.model_worker.attention.metadata import AttentionMetadata
from vibe_sgl_lite.model_worker.cpu import CpuKernels, LayerCache
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles

# Contexts are summed in ranges of this length, whatever else runs: a decode row's attention does not depend on its
# batch. As quick as ranges cut to the load, at 1 to 16 rows and contexts of 192 to 2048.
SPLIT_TOKENS = 128


class KernelAttention:
    """An `AttentionBackend` (qwen3/attention_backend.py) whose metadata is `AttentionMetadata`."""

    def __init__(self, kernels: CpuKernels, pool: KVPool) -> None:
        self.kernels = kernels
        self.caches = [
            LayerCache(pool.keys(layer), pool.values(layer), pool.key_scales(layer), pool.value_scales(layer))
            for layer in range(pool.num_layers)
        ]
        self.scale = float(pool.head_dim**-0.5)

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        query_norm: RMSNorm,
        key_norm: RMSNorm,
        angles: RopeAngles,
        metadata: AttentionMetadata,
    ) -> Tensor:
        cache = self.caches[layer]
        query = self.kernels.qkv_rope_store(
            qkv,
            query_norm.weight.tensor,
            key_norm.weight.tensor,
            query_norm.eps,
            angles.cos,
            angles.sin,
            cache,
            metadata.cache_slots,
        )
        attended = self.kernels.paged_attention(
            query,
            cache,
            metadata.query_start,
            metadata.context_lengths,
            metadata.page_table,
            scale=self.scale,
            split_tokens=SPLIT_TOKENS,
        )
        return attended.view(qkv.shape[0], -1)
