"""Causal attention of many new tokens a row over the row's paged context, the new tokens included.

A tile is BLOCK_M / G new tokens of a row times the G query heads of one KV head: keys and values are read once for the
whole group. First the blocks of keys that every token of the tile sees, without a mask, then the ones on the diagonal.
Of a cache in 8 bits only what lies before the chunk is read: the chunk's own keys and values, as they are cached but in
16 bits, are still where `rope_store` left them.
Tiles are listed by the host, a row's longest first where they are many (see `plan_tiles`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache, even_dims, odd_dims
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import LOG2_E, WEIGHT_UNIT

IntArray = npt.NDArray[np.int32]
FEW_TOKENS = 512  # of a launch, up to which large tiles would leave multiprocessors without one
SOME_TOKENS = 1280  # up to which there is a large tile for each, and no second one to wait beside


@dataclass(frozen=True)
class PrefillTiles:
    """How a launch is cut: rows (tokens x heads of a group) and keys of a block, warps and stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_prefill_tiles(tokens: int, group: int, dtype: torch.dtype) -> PrefillTiles:
    """For a launch over so many new tokens; dtype: of the cache, int8 for 8 bits. Measured on an H100
    (docs/measurements.md)."""
    if dtype == torch.float32:
        return PrefillTiles(max(32, triton.next_power_of_2(group)), 32, 4, 2)
    if tokens <= FEW_TOKENS:
        return PrefillTiles(max(64, triton.next_power_of_2(group)), 64, 4, 3)
    if dtype == torch.int8:
        return PrefillTiles(max(64, triton.next_power_of_2(group)), 64, 4, 2)
    rows = max(128, triton.next_power_of_2(group))
    return PrefillTiles(rows, 128, 8, 2) if tokens <= SOME_TOKENS else PrefillTiles(rows, 64, 4, 2)


def fixed_prefill_tiles(group: int, dtype: torch.dtype) -> PrefillTiles:
    """The same for any launch, so that no row's sums depend on what else there is."""
    return choose_prefill_tiles(1, group, dtype)


def plan_tiles(query_start: IntArray, rows: IntArray, tokens: int) -> IntArray:
    """[tiles, 2] int32: row and first new token of each tile, where a tile takes `tokens` new ones.

    query_start: [R + 1]; rows: which of the R rows. The tiles of a row come last first: they have the most keys.
    """
    counts = query_start[rows + 1] - query_start[rows]
    tiles = -(-counts // tokens)
    first = np.cumsum(tiles) - tiles
    index = np.arange(tiles.sum(), dtype=np.int32) - np.repeat(first, tiles).astype(np.int32)
    place = (np.repeat(tiles, tiles) - 1 - index) * tokens
    return np.stack((np.repeat(rows, tiles), place), axis=1).astype(np.int32)


@triton.jit
def _attend_blocks(
    q, q_odd, maximum, norm, total, odd, start, end, last_seen, table, keys, values, key_scales, value_scales, head,
    page_stride, token_stride, head_stride, scale_stride, scale,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, IN_CODES: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Take keys start .. end into the running softmax; end is their last multiple or, MASKED, what must not be read.

    PAGE: 0 where keys and values are lines behind each other, without a page table.
    """
    dims = tl.arange(0, W)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK_N)
        here = token < end
        if PAGE == 0:
            place = token.to(tl.int64) * token_stride + head * head_stride
        else:
            if PAGE % BLOCK_N == 0:
                page = tl.load(table + first // PAGE).to(tl.int64)
                inside = first % PAGE + tl.arange(0, BLOCK_N)
            else:
                page = tl.load(table + token // PAGE, mask=here, other=0).to(tl.int64)
                inside = token % PAGE
            place = page * page_stride + inside * token_stride + head * head_stride
        if MASKED:
            key = tl.load(keys + place[None, :] + dims[:, None], mask=here[None, :], other=0)
        else:
            key = tl.load(keys + place[None, :] + dims[:, None])
        if IN_CODES:
            scale_place = page * scale_stride + head * PAGE + inside
            key_scale = tl.load(key_scales + scale_place, mask=here, other=0.0)
            value_scale = tl.load(value_scales + scale_place, mask=here, other=0.0) * WEIGHT_UNIT
            score = (
                tl.dot(q_odd, odd_dims(key, INTEGERS, ASM), tl.dot(q, even_dims(key, INTEGERS, ASM)))
                * (key_scale * UNIT)[None, :]
            )
        else:
            score = tl.dot(q, key, input_precision=PRECISION)
        if MASKED:
            score = tl.where(token[None, :] <= last_seen[:, None], score, -float("inf"))
        higher = tl.maximum(maximum, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        if MASKED:
            value = tl.load(values + place[:, None] + dims[None, :], mask=here[:, None], other=0)
        else:
            value = tl.load(values + place[:, None] + dims[None, :])
        norm = norm * shrink + tl.sum(weight, 1)
        if IN_CODES:
            half = (weight * value_scale[None, :]).to(tl.float16)
            total = tl.dot(half, even_dims(value, INTEGERS, ASM), total * shrink[:, None])
            odd = tl.dot(half, odd_dims(value, INTEGERS, ASM), odd * shrink[:, None])
        else:
            total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
        maximum = higher
    return maximum, norm, total, odd


@triton.jit
def _prefill_attention(
    query, keys, values, output, page_table, context_lengths, query_start, tiles, key_scales, value_scales, fresh,
    positions, fresh_stride, query_stride, table_stride, page_stride, token_stride, head_stride, scale_stride, scale,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, G: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    IN_CODES: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, tiles). W: as in `_decode_attention`. FIXED: tokens lie at `positions`, all blocks are masked."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    listed = tl.load(tiles + tile * 2)
    row = tl.maximum(listed, 0)
    first = tl.where(listed < 0, 0, tl.load(tiles + tile * 2 + 1))
    row_start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - row_start
    cached = tl.where(listed < 0, 0, tl.load(context_lengths + row) - count)
    count = tl.where(listed < 0, 0, count)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    token = first + index // G
    inside = (token < count) & (index < BLOCK_M // G * G)
    here = inside[:, None]
    heads = (head * G + index % G)[:, None] * D + dim[None, :]
    line = (row_start + token).to(tl.int64)[:, None]
    q = tl.load(query + line * query_stride + heads, mask=here, other=0.0)
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    table = page_table + row.to(tl.int64) * table_stride
    none = 0.0
    total = tl.zeros([BLOCK_M, D], tl.float32)
    before = cached
    last_seen = cached + token
    end = cached + tl.minimum(first + BLOCK_M // G, count)
    if FIXED:  # no row's path depends on the others of its tile
        last_seen = tl.load(positions + row_start + token, mask=inside, other=0)
        end = tl.minimum(tl.max(tl.where(inside, last_seen, -1), 0) + 1, cached + count)
    if IN_CODES:
        q_even, q_odd = tl.split(tl.reshape(q.to(tl.float16), [BLOCK_M, W, 2]))
        even = tl.zeros([BLOCK_M, W], tl.float32)
        odd = tl.zeros([BLOCK_M, W], tl.float32)
        if FIXED:
            maximum, norm, even, odd = _attend_blocks(
                q_even, q_odd, maximum, norm, even, odd, 0, end, last_seen, table, keys, values, key_scales,
                value_scales, head, page_stride, token_stride, head_stride, scale_stride, scale,
                PAGE, BLOCK_N, W, True, STAGES, PRECISION, UNIT, True, INTEGERS, ASM,
            )  # fmt: skip
        else:
            whole = cached // BLOCK_N * BLOCK_N
            last_cached = tl.zeros([BLOCK_M], tl.int32) + (cached - 1)
            maximum, norm, even, odd = _attend_blocks(
                q_even, q_odd, maximum, norm, even, odd, 0, whole, last_cached, table, keys, values, key_scales,
                value_scales, head, page_stride, token_stride, head_stride, scale_stride, scale,
                PAGE, BLOCK_N, W, False, STAGES, PRECISION, UNIT, True, INTEGERS, ASM,
            )  # fmt: skip
            maximum, norm, even, odd = _attend_blocks(
                q_even, q_odd, maximum, norm, even, odd, whole, cached, last_cached, table, keys, values, key_scales,
                value_scales, head, page_stride, token_stride, head_stride, scale_stride, scale,
                PAGE, BLOCK_N, W, True, STAGES, PRECISION, UNIT, True, INTEGERS, ASM,
            )  # fmt: skip
            keys = fresh + row_start.to(tl.int64) * fresh_stride + KV_HEADS * G * D
            values = keys + KV_HEADS * D
            token_stride = fresh_stride
            head_stride = D
            before = 0
            last_seen = token
            end = tl.minimum(first + BLOCK_M // G, count)
        total = tl.reshape(tl.join(even, odd), [BLOCK_M, D]) * (UNIT / WEIGHT_UNIT)
    if not FIXED:
        seen_by_all = (before + first + 1) // BLOCK_N * BLOCK_N
        maximum, norm, total, none = _attend_blocks(
            q, q, maximum, norm, total, none, 0, seen_by_all, last_seen, table, keys, values, key_scales,
            value_scales, head, page_stride, token_stride, head_stride, scale_stride, scale,
            0 if IN_CODES else PAGE, BLOCK_N, D, False, STAGES, PRECISION, UNIT, False, INTEGERS, ASM,
        )  # fmt: skip
        maximum, norm, total, none = _attend_blocks(
            q, q, maximum, norm, total, none, seen_by_all, end, last_seen, table, keys, values, key_scales,
            value_scales, head, page_stride, token_stride, head_stride, scale_stride, scale,
            0 if IN_CODES else PAGE, BLOCK_N, D, True, STAGES, PRECISION, UNIT, False, INTEGERS, ASM,
        )  # fmt: skip
    elif not IN_CODES:
        maximum, norm, total, none = _attend_blocks(
            q, q, maximum, norm, total, none, 0, end, last_seen, table, keys, values, key_scales, value_scales,
            head, page_stride, token_stride, head_stride, scale_stride, scale,
            PAGE, BLOCK_N, D, True, STAGES, PRECISION, UNIT, False, INTEGERS, ASM,
        )  # fmt: skip
    if FIXED:
        norm = tl.where(norm == 0.0, 1.0, norm)  # a row without context gets zeros
    place = output + line * (KV_HEADS * G * D) + heads
    tl.store(place, (total / norm[:, None]).to(output.dtype.element_ty), mask=here)


def prefill_attention(
    query: Tensor,
    cache: LayerCache,
    page_table: Tensor,
    context_lengths: Tensor,
    query_start: Tensor,
    tiles: Tensor,
    cut: PrefillTiles,
    output: Tensor,
    *,
    pdl: bool,
    fresh: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Fill the lines of `output`, [T, heads x D], that `tiles` lists, for query of the same shape.

    fresh: for a cache in 8 bits, and only there, but not with positions: [T, (heads + 2 x kv heads) x D], `qkv` as
    `rope_store` kept it.
    positions: [T] int32, where tokens lie, and not at the end of their row's context: then no other token of the launch
    has a part in what one gets. A row of context length 0 gets zeros.

    page_table, context_lengths: as in `decode_attention`. query_start: [R + 1] int32.
    tiles: [n, 2] int32 on the device, `plan_tiles` for cut.rows // group tokens a tile; NO_ROW twice is none.
    """
    keys, values, head_dim = cache.keys, cache.values, cache.head_dim
    page_size, kv_heads, elements = keys.shape[1:]
    group = output.shape[1] // (kv_heads * head_dim)
    assert keys.stride() == values.stride()
    assert keys.stride(3) == query.stride(1) == output.stride(1) == page_table.stride(1) == 1
    assert (cache.in_codes and positions is None) == (fresh is not None)
    fresh = query if fresh is None else fresh
    options = {"launch_pdl": True} if pdl else {}
    _prefill_attention[(kv_heads, len(tiles))](
        query, keys, values, output, page_table, context_lengths, query_start, tiles, *cache.scale_arguments[:2],
        fresh, query_start if positions is None else positions, fresh.stride(0),
        query.stride(0), page_table.stride(0), *keys.stride()[:3], cache.scale_arguments[2], head_dim**-0.5 * LOG2_E,
        PAGE=page_size, BLOCK_M=cut.rows, BLOCK_N=cut.keys, G=group, KV_HEADS=kv_heads, D=head_dim, W=elements,
        STAGES=cut.stages, PRECISION="ieee" if query.dtype == torch.float32 else "tf32", UNIT=cache.unit,
        IN_CODES=cache.in_codes, INTEGERS=cache.integers, ASM=query.is_cuda, PDL=pdl,
        FIXED=positions is not None, num_warps=cut.warps, num_stages=cut.stages, **options,
    )  # fmt: skip
