"""An 8-bit cache of one layer, made from what it is to hold."""

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu import LayerCache
from vibe_sgl_lite.model_worker.kv_int8 import SCALE_BYTES, dequantize, quantize


def empty_int8_cache(pages: int, page_size: int, kv_heads: int, head_dim: int) -> LayerCache:
    """All bytes are -1: scales of NaN, so that what is read without having been written shows."""
    codes = page_size * kv_heads * head_dim
    data = torch.full((2, pages, codes + page_size * kv_heads * SCALE_BYTES), -1, dtype=torch.int8)
    keys, values = data[:, :, :codes].view(2, pages, page_size, kv_heads, head_dim)
    key_scales, value_scales = data.view(torch.float32)[:, :, codes // 4 :].view(2, pages, kv_heads, page_size)
    return LayerCache(keys, values, key_scales, value_scales)


def int8_cache(keys: Tensor, values: Tensor) -> LayerCache:
    """keys, values: [pages, page size, kv heads, head dim], floating."""
    cache = empty_int8_cache(*keys.shape)
    for codes, scales, x in (
        (cache.keys, cache.key_scales, keys),
        (cache.values, cache.value_scales, values),
    ):
        assert scales is not None
        new_codes, new_scales = quantize(x)
        codes.copy_(new_codes)
        scales.copy_(new_scales.transpose(1, 2))
    return cache


def contents(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values as fp32, [pages, page size, kv heads, head dim], of a cache of any kind."""
    if cache.key_scales is None or cache.value_scales is None:
        return cache.keys.float(), cache.values.float()
    return (
        dequantize(cache.keys, cache.key_scales.transpose(1, 2), torch.float32),
        dequantize(cache.values, cache.value_scales.transpose(1, 2), torch.float32),
    )
