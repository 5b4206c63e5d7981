"""Normalise queries and keys a head, turn them by their position, and store keys and values in the paged cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache, decode, encode


@triton.jit
def normal_and_turned(start, weight, cos, sin, eps, D: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    """[HP, D] fp32: H heads from `start` on, each divided by its rms, times weight, rotated (half-split)."""
    head = tl.arange(0, HP)[:, None]
    dim = tl.arange(0, D)
    pair = (dim + D // 2) % D  # what each dimension turns together with
    x = tl.load(start + head * D + dim[None, :], mask=head < H, other=0.0)
    other = tl.load(start + head * D + pair[None, :], mask=head < H, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x = (x * factor * tl.load(weight + dim).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    other = other.to(tl.float32) * factor * tl.load(weight + pair).to(tl.float32)[None, :]
    other = other.to(dtype).to(tl.float32)
    return x * cos[None, :] + other * sin[None, :]


@triton.jit
def _rope_store(
    qkv, query_norm, key_norm, cosines, sines, slots, query, keys, values, query_eps, key_eps, angle_stride,
    page_stride, token_stride, head_stride, key_scales, value_scales, scale_stride,
    PAGE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, KV_HEADS: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    IN_CODES: tl.constexpr, INTEGERS: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a token. HP, KP: H and KV_HEADS rounded up to powers of two. IN_CODES: keys and values are codes, and
    what these say goes back to `qkv` if KEEP."""
    token = tl.program_id(0)
    dim = tl.arange(0, D)
    slot = tl.load(slots + token).to(tl.int64)
    angle = token.to(tl.int64) * angle_stride + dim % (D // 2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # In the first layer, the kernel that makes these may have been running a moment ago.
    cos = tl.load(cosines + angle).to(tl.float32)
    sin = tl.load(sines + angle).to(tl.float32) * tl.where(dim < D // 2, -1.0, 1.0)
    start = qkv + token.to(tl.int64) * ((H + 2 * KV_HEADS) * D)
    turned = normal_and_turned(start, query_norm, cos, sin, query_eps, D, H, HP)
    head = tl.arange(0, HP)[:, None]
    tl.store(
        query + token.to(tl.int64) * (H * D) + head * D + dim[None, :], turned.to(query.dtype.element_ty), mask=head < H
    )
    key = normal_and_turned(start + H * D, key_norm, cos, sin, key_eps, D, KV_HEADS, KP)
    head = tl.arange(0, KP)[:, None]
    value = tl.load(start + (H + KV_HEADS) * D + head * D + dim[None, :], mask=head < KV_HEADS, other=0.0)
    place = slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride + dim[None, :]
    if IN_CODES:
        key_codes, key_scale = encode(key.to(query.dtype.element_ty).to(tl.float32), INTEGERS)
        value_codes, value_scale = encode(value.to(tl.float32), INTEGERS)
        tl.store(keys + place, key_codes, mask=head < KV_HEADS)
        tl.store(values + place, value_codes, mask=head < KV_HEADS)
        line = tl.arange(0, KP)
        scale_place = slot // PAGE * scale_stride + line * PAGE + slot % PAGE
        tl.store(key_scales + scale_place, key_scale, mask=line < KV_HEADS)
        tl.store(value_scales + scale_place, value_scale, mask=line < KV_HEADS)
        if KEEP:
            kept = start + H * D + head * D + dim[None, :]
            tl.debug_barrier()  # other threads have read what lies there
            tl.store(kept, decode(key_codes, key_scale, INTEGERS).to(qkv.dtype.element_ty), mask=head < KV_HEADS)
            said = decode(value_codes, value_scale, INTEGERS).to(qkv.dtype.element_ty)
            tl.store(kept + KV_HEADS * D, said, mask=head < KV_HEADS)
    else:
        tl.store(keys + place, key.to(keys.dtype.element_ty), mask=head < KV_HEADS)
        tl.store(values + place, value, mask=head < KV_HEADS)


def rope_store(
    qkv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    eps: tuple[float, float],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: LayerCache,
    query: Tensor,
    *,
    pdl: bool,
    keep: bool = False,
) -> None:
    """Fill query, [T, heads x D], and the slots' places in the cache.

    keep: for a cache in 8 bits: keys and values in `qkv` become what is cached of them, for `prefill_attention`.
    qkv: [T, (heads + 2 x kv heads) x D]. query_norm, key_norm: [D] weights; eps: of both. cos, sin: [T, D / 2].
    slots: [T] int64, page x page size + place.
    """
    page_size, kv_heads = cache.keys.shape[1:3]
    head_dim = cache.head_dim
    keys, values = (x.view(torch.int8) if cache.in_codes else x for x in (cache.keys, cache.values))
    tokens, width = query.shape
    heads = width // head_dim
    assert qkv.is_contiguous()
    assert query.is_contiguous()
    assert cos.stride() == sin.stride() == (cos.stride(0), 1)
    assert qkv.shape[1] == (heads + 2 * kv_heads) * head_dim
    assert keys.stride() == values.stride()
    options = {"launch_pdl": True} if pdl else {}
    _rope_store[(tokens,)](
        qkv, query_norm, key_norm, cos, sin, slots, query, keys, values, *eps, cos.stride(0),
        *keys.stride()[:3], *cache.scale_arguments,
        PAGE=page_size, H=heads, HP=triton.next_power_of_2(heads), KV_HEADS=kv_heads,
        KP=triton.next_power_of_2(kv_heads), D=head_dim, IN_CODES=cache.in_codes, INTEGERS=cache.integers, KEEP=keep,
        PDL=pdl, num_warps=8 if heads * head_dim > 1024 else 4, **options,
    )  # fmt: skip
