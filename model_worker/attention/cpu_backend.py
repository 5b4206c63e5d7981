"""Attention over the paged pool through the CPU kernels: norm, rotation and store in one call, attention in another."""

from torch import Tensor

from vibe_sgl_lite.model_worker.cpu import CpuKernels, LayerCache
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, StepBackend
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles


class KernelAttention(StepBackend):
    """Its metadata is the batch itself."""

    def __init__(self, kernels: CpuKernels, pool: KVPool) -> None:
        self.kernels = kernels
        self.caches = [
            LayerCache(pool.keys(layer), pool.values(layer), pool.key_scales(layer), pool.value_scales(layer))
            for layer in range(pool.num_layers)
        ]
        self.scale = float(pool.head_dim**-0.5)

    def prepare(self, batch: DeviceBatch) -> DeviceBatch:
        return batch

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        query_norm: RMSNorm,
        key_norm: RMSNorm,
        angles: RopeAngles,
        metadata: DeviceBatch,
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
            metadata.slot_mapping,
        )
        attended = self.kernels.paged_attention(
            query,
            cache,
            metadata.query_start,
            metadata.context_lengths,
            metadata.page_table,
            self.scale,
        )
        return attended.view(qkv.shape[0], -1)
