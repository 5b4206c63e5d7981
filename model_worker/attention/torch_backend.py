"""Attention over the paged pool in plain torch: the reference that every faster backend is tested against.

Runs on any device, over a pool of the model's dtype or of int8. Gathers one request's context at a time, so its extra
memory is that of the longest request.
Legend: G query heads a KV head, N new tokens of a row, C its context, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, StepBackend
from vibe_sgl_lite.model_worker.kv_int8 import dequantize, quantize
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles


class TorchAttention(StepBackend):
    """Its metadata is the batch itself."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

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
        kv_heads, head_dim = self.pool.kv_heads, self.pool.head_dim
        packed = qkv.view(qkv.shape[0], -1, head_dim)
        query, key, value = packed[:, : -2 * kv_heads], packed[:, -2 * kv_heads : -kv_heads], packed[:, -kv_heads:]
        query, key = angles.rotate(_norm(query, query_norm)), angles.rotate(_norm(key, key_norm))
        keys, key_scales = self.pool.keys(layer), self.pool.key_scales(layer)
        values, value_scales = self.pool.values(layer), self.pool.value_scales(layer)
        _store(key, metadata.slot_mapping, keys, key_scales)
        _store(value, metadata.slot_mapping, values, value_scales)
        output = query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))
        starts = metadata.host_query_start.tolist()
        for row, context in enumerate(metadata.host_context_lengths.tolist()):
            if context == 0:  # padding
                output[starts[row] : starts[row + 1]] = 0
                continue
            pages = metadata.page_table[row, : -(-context // self.pool.page_size)]
            row_keys = _gather(pages, keys, key_scales, query.dtype)[:context]
            row_values = _gather(pages, values, value_scales, query.dtype)[:context]
            tokens = slice(starts[row], starts[row + 1])
            output[tokens] = _attend(query[tokens], row_keys, row_values)
        return output


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight.tensor, norm.eps)


def _store(x: Tensor, slots: Tensor, elements: Tensor, scales: Tensor | None) -> None:
    """x: [T, kv heads, D] into the pool's elements, [page, token, kv head, D], and scales, [page, kv head, token]."""
    page, place = slots // elements.shape[1], slots % elements.shape[1]
    if scales is None:
        elements[page, place] = x
    else:
        elements[page, place], scales[page, :, place] = quantize(x)


def _gather(pages: Tensor, elements: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What lies in `pages`, in their order, in dtype: [page x token, kv heads, D]."""
    rows = elements.index_select(0, pages).flatten(0, 1)
    if scales is None:
        return rows
    return dequantize(rows, scales.index_select(0, pages).transpose(1, 2).flatten(0, 1), dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query: [N, heads, D], the last N of the C positions of key and value: [C, kv heads, D]. Returns [N, heads * D].

    The G query heads of a KV head become queries of one token (decode) or a batch over the same keys (a chunk), since
    scaled_dot_product_attention's own `enable_gqa` copies keys and values G times on CPU. Its fast path takes only
    four dimensions.
    """
    num_new, heads, dim = query.shape
    context, kv_heads = key.shape[0], key.shape[1]
    group = heads // kv_heads
    key, value = key.transpose(0, 1), value.transpose(0, 1)  # [kv heads, C, D]
    if num_new == 1:
        folded = query.view(1, kv_heads, group, dim)
        return F.scaled_dot_product_attention(folded, key[None], value[None]).reshape(1, heads * dim)
    grouped = query.view(num_new, kv_heads, group, dim).permute(2, 1, 0, 3)  # [G, kv heads, N, D]
    key, value = key.expand(group, -1, -1, -1), value.expand(group, -1, -1, -1)
    if num_new == context:
        attended = F.scaled_dot_product_attention(grouped, key, value, is_causal=True)
    else:
        mask = torch.ones((num_new, context), dtype=torch.bool, device=query.device).tril(context - num_new)
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
    return attended.permute(2, 1, 0, 3).reshape(num_new, heads * dim)
