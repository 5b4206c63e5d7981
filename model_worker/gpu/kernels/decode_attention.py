"""Attention of one new token a row, or some with drafts, over the row's paged context.

One program a (kv head, row, split): the query heads of a KV head, of all of the row's new tokens, are the rows of its
matrix products, so that keys and values are read once. The softmax runs along the keys in blocks (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018); contexts may be cut in splits, whose last program to
arrive merges them (flash-decoding). Rows are taken in a given order, longest first, so that no long row starts last.

Legend: R rows, G query heads a KV head, D head dim.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache, encode, even_dims, odd_dims
from vibe_sgl_lite.model_worker.gpu.kernels.product import prefetch
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import normal_and_turned

LOG2_E = 1.4426950408889634
MERGED = tl.constexpr(16)  # partial results that are added up at once
WEIGHT_UNIT = tl.constexpr(16.0)  # keeps softmax weights times scales of codes above the least fp16
NO_ROW = -1  # in place of a row: nothing to do


@dataclass(frozen=True)
class DecodeTiles:
    """How a launch is cut: keys a block, warps and pipeline stages of a program, splits of a context."""

    keys: int
    warps: int
    stages: int
    splits: int


# By the most rows that they are for; measured on an H100 with 8 KV heads of 128 and contexts of about 850.
TILES = (
    (4, DecodeTiles(64, 4, 3, 16)),
    (8, DecodeTiles(64, 4, 3, 8)),
    (16, DecodeTiles(64, 2, 2, 8)),
    (32, DecodeTiles(64, 2, 2, 4)),
    (64, DecodeTiles(128, 4, 2, 1)),
)
MANY_ROWS = DecodeTiles(64, 4, 2, 1)
NARROW = (33, 64)  # rows with smaller blocks where the next kernel's should find room beside them
LONG_CONTEXT = 4096  # tokens; above, few rows are cut in more splits
LONG_PROGRAMS = 512  # that a launch over long contexts should have at least
MAX_SPLITS = 32
WIDE_SPLITS = 8  # at most, of rows with drafts: what merges them has all heads of all tokens at once


def choose_tiles(
    rows: int, kv_heads: int, dtype: torch.dtype, max_context: int, *, wide: bool = False, narrow: bool = False
) -> DecodeTiles:
    """The tiles for a launch of `rows` over a cache of this dtype, int8 for 8 bits. wide: with drafts. narrow: those of
    `NARROW`.

    fp32 takes half the keys a block, for shared memory's sake; of 8 bits more blocks fit.
    """
    tiles = next((tiles for most, tiles in TILES if rows <= most), MANY_ROWS)
    if narrow and NARROW[0] <= rows <= NARROW[1]:
        tiles = MANY_ROWS
    if max_context > LONG_CONTEXT:
        wanted = triton.next_power_of_2(-(-LONG_PROGRAMS // max(1, rows * kv_heads)))
        tiles = replace(tiles, splits=min(max(tiles.splits, wanted), MAX_SPLITS))
    if wide:
        tiles = replace(tiles, splits=min(tiles.splits, WIDE_SPLITS))
    if dtype == torch.int8:
        return replace(tiles, stages=5 if tiles == MANY_ROWS else 3)
    return replace(tiles, keys=32, stages=2) if dtype == torch.float32 else tiles


class DecodeScratch:
    """What splits leave for the one that merges them. One for all layers: launches follow each other.

    For any launch that `choose_tiles` cuts, over `kv_heads` KV heads with `group` query heads each; or one of
    `places`, which is rows x splits. wide_rows: with rows of some tokens each, so many tokens in all.
    """

    def __init__(
        self, kv_heads: int, group: int, head_dim: int, device: torch.device, places: int = 0, wide_rows: int = 0
    ) -> None:
        # Above the last row count here no launch is split.
        rows = max(LONG_PROGRAMS // kv_heads + 1, max(most for most, _ in TILES))
        for count in range(1, rows + 1):
            for context in (1, LONG_CONTEXT + 1):
                places = max(places, count * choose_tiles(count, kv_heads, torch.float16, context).splits)
        for count in range(1, min(rows, wide_rows) + 1):
            splits = choose_tiles(count, kv_heads, torch.float16, LONG_CONTEXT + 1).splits
            places = max(places, wide_rows * splits)
        self.sums = torch.empty((places * kv_heads * group, head_dim), dtype=torch.float32, device=device)
        self.maxima_and_norms = torch.empty((places * kv_heads * group, 2), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(places * kv_heads, dtype=torch.int32, device=device)  # zero between launches


@dataclass(frozen=True)
class NewTokens:
    """What `rope_store` takes beside queries, keys and values: query_norm, key_norm [D] weights and their eps; cos, sin
    [R, D / 2]; slots [R] int64."""

    query_norm: Tensor
    key_norm: Tensor
    eps: tuple[float, float]
    cos: Tensor
    sin: Tensor
    slots: Tensor


@triton.jit
def _merge(
    output, sums, maxima_and_norms, first, splits, output_row, G: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Add up the partial results of `splits` places from `first` on, for each head of a group."""
    dims = tl.arange(0, D)
    part = tl.arange(0, AT_ONCE)
    for head in tl.static_range(G):
        maximum = -float("inf")
        norm = 0.0
        total = tl.zeros([D], tl.float32)
        for begin in range(0, splits, AT_ONCE):
            here = begin + part < splits
            place = (first + begin + part) * G + head
            maxima = tl.load(maxima_and_norms + place * 2, mask=here, other=-float("inf"), cache_modifier=".cg")
            norms = tl.load(maxima_and_norms + place * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
            partial = tl.load(
                sums + place[:, None] * D + dims[None, :], mask=here[:, None], other=0.0, cache_modifier=".cg"
            )
            higher = tl.maximum(maximum, tl.max(maxima, 0))
            weight = tl.exp2(maxima - higher)
            shrink = tl.exp2(maximum - higher)
            norm = norm * shrink + tl.sum(weight * norms, 0)
            total = total * shrink + tl.sum(weight[:, None] * partial, 0)
            maximum = higher
        tl.store(output + output_row + head * D + dims, (total / norm).to(output.dtype.element_ty))


@triton.jit
def _merge_wide(
    output, sums, maxima_and_norms, first, splits, lines, G, WIDE, HEADS, D: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """`_merge` of the G heads of each of WIDE / G tokens, whose lines of HEADS heads follow each other: all at once."""
    dims = tl.arange(0, D)
    member = tl.arange(0, GP)
    inside = member < WIDE
    maximum = tl.full([GP], -float("inf"), tl.float32)
    norm = tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, D], tl.float32)
    for split in tl.static_range(SPLITS):  # their loads are all under way together
        here = inside & (split < splits)
        spot = (first + split) * WIDE + member
        maxima = tl.load(maxima_and_norms + spot * 2, mask=here, other=-float("inf"), cache_modifier=".cg")
        norms = tl.load(maxima_and_norms + spot * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
        partial = tl.load(sums + spot[:, None] * D + dims[None, :], mask=here[:, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(maximum, maxima)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(maxima - base)
        shrink = tl.exp2(maximum - base)
        norm = norm * shrink + weight * norms
        total = total * shrink[:, None] + weight[:, None] * partial
        maximum = higher
    line = lines + (member // G * HEADS + member % G) * D
    result = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    tl.store(output + line[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _decode_attention(
    query, keys, values, output, page_table, context_lengths, order, sums, maxima_and_norms, arrived,
    key_scales, value_scales, query_stride, table_stride, page_stride, token_stride, head_stride, scale_stride, scale,
    query_norm, key_norm, cosines, sines, slots, key_codes, value_codes, query_eps, key_eps, angle_stride,
    positions, width,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, IN_CODES: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, R, SPLITS). scale: of the scores, times log2(e). GP: G rounded up to a matrix's least rows.

    W: elements of a key, D, or in 8 bits D / 2 words: q and total are then of even dims, q_odd and odd of the others.
    FRESH: query are rows of queries, keys and values as a product gave them. The program whose split has the new token
    stores its key and value before it reads any. WIDE: rows have `width` tokens each, which see what is not behind
    their positions; GP is for all of their heads.
    """
    head = tl.program_id(0)
    split = tl.program_id(2)
    listed = tl.load(order + tl.program_id(1))
    row = tl.maximum(listed, 0)
    length = tl.load(context_lengths + row)
    dims = tl.arange(0, W)
    group = tl.arange(0, GP)
    if WIDE:
        in_group = (group < G * width)[:, None]
        line_of = row.to(tl.int64) * width + group // G
        head_place = (line_of * query_stride + (head * G + group % G) * D)[:, None]
        last_seen = tl.load(positions + line_of, mask=group < G * width, other=0)
    else:
        in_group = (group < G)[:, None]
    if SPLITS == 1:
        splits = 1
        start = 0
        end = length
    else:  # as many as have a block of keys at least
        each = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK), 1) * BLOCK
        splits = tl.maximum(tl.cdiv(length, each), 1)
        start = split * each
        end = tl.minimum(start + each, length)
    if PDL:
        gdc_launch_dependents()
        if FRESH:  # noqa: SIM102 - what is cached does not depend on the kernel before this one
            if (start < length) & (split < splits):
                early = tl.minimum(start + tl.arange(0, BLOCK), length - 1)
                page = tl.load(page_table + row.to(tl.int64) * table_stride + early // PAGE).to(tl.int64)
                place = page * page_stride + early % PAGE * token_stride + head * head_stride
                lines = tl.arange(0, 2) * (W // 2)
                prefetch(keys + place[:, None] + lines[None, :])
                prefetch(values + place[:, None] + lines[None, :])
        gdc_wait()
    if (split < splits) & (listed >= 0):
        line = query + row.to(tl.int64) * query_stride
        dim = tl.arange(0, D)
        if FRESH:
            angle = row * angle_stride + dim % (D // 2)
            cos = tl.load(cosines + angle).to(tl.float32)
            sin = tl.load(sines + angle).to(tl.float32) * tl.where(dim < D // 2, -1.0, 1.0)
            turned = normal_and_turned(line + head * G * D, query_norm, cos, sin, query_eps, D, G, GP)
            whole = turned.to(query.dtype.element_ty)
            if (start < length) & (end == length):
                slot = tl.load(slots + row).to(tl.int64)
                new_key = normal_and_turned(line + (KV_HEADS * G + head) * D, key_norm, cos, sin, key_eps, D, 1, 1)
                new_key = new_key.to(query.dtype.element_ty)
                one = tl.arange(0, 1)
                new_value = tl.load(line + (KV_HEADS * (G + 1) + head + one)[:, None] * D + dim[None, :])
                new_page = slot // PAGE
                if IN_CODES:  # keys and values are words, their strides too
                    spot = new_page * page_stride + slot % PAGE * token_stride + head * head_stride
                    spot = spot * 2 + dim[None, :]
                    scale_spot = new_page * scale_stride + head * PAGE + slot % PAGE + one
                    codes, code_scale = encode(new_key.to(tl.float32), INTEGERS)
                    tl.store(key_codes + spot, codes)
                    tl.store(key_scales + scale_spot, code_scale)
                    codes, code_scale = encode(new_value.to(tl.float32), INTEGERS)
                    tl.store(value_codes + spot, codes)
                    tl.store(value_scales + scale_spot, code_scale)
                else:
                    spot = new_page * page_stride + slot % PAGE * token_stride + head * head_stride + dim[None, :]
                    tl.store(keys + spot, new_key)
                    tl.store(values + spot, new_value)
                tl.debug_barrier()  # other threads of this program read it
        elif WIDE:
            whole = tl.load(query + head_place + dim[None, :], mask=in_group, other=0.0)
        else:
            whole = tl.load(line + (head * G + group)[:, None] * D + dim[None, :], mask=in_group, other=0.0)
        if IN_CODES:
            q, q_odd = tl.split(tl.reshape(whole.to(tl.float16), [GP, W, 2]))
            odd = tl.zeros([GP, W], tl.float32)
        else:
            q = whole
        maximum = tl.full([GP], -float("inf"), tl.float32)
        norm = tl.zeros([GP], tl.float32)
        total = tl.zeros([GP, W], tl.float32)
        table = page_table + row.to(tl.int64) * table_stride
        for first in tl.range(start, end, BLOCK, num_stages=STAGES):
            token = first + tl.arange(0, BLOCK)
            here = token < end
            if PAGE % BLOCK == 0:  # the block lies in one page
                page = tl.load(table + first // PAGE).to(tl.int64)
                inside = first % PAGE + tl.arange(0, BLOCK)
            else:
                page = tl.load(table + token // PAGE, mask=here, other=0).to(tl.int64)
                inside = token % PAGE
            place = page * page_stride + inside * token_stride + head * head_stride
            key = tl.load(keys + place[None, :] + dims[:, None], mask=here[None, :], other=0)
            if IN_CODES:
                scale_place = page * scale_stride + head * PAGE + inside
                key_scale = tl.load(key_scales + scale_place, mask=here, other=0.0) * (scale * UNIT)
                value_scale = tl.load(value_scales + scale_place, mask=here, other=0.0) * WEIGHT_UNIT
                score = (
                    tl.dot(q_odd, odd_dims(key, INTEGERS, ASM), tl.dot(q, even_dims(key, INTEGERS, ASM)))
                    * key_scale[None, :]
                )
            else:
                score = tl.dot(q, key, input_precision=PRECISION) * scale
            if WIDE:
                score = tl.where(here[None, :] & (token[None, :] <= last_seen[:, None]), score, -float("inf"))
                higher = tl.maximum(maximum, tl.max(score, 1))
                base = tl.where(higher == -float("inf"), 0.0, higher)  # of a token that sees none of the block
            else:
                score = tl.where(here[None, :], score, -float("inf"))
                higher = tl.maximum(maximum, tl.max(score, 1))
                base = higher
            shrink = tl.exp2(maximum - base)
            weight = tl.exp2(score - base[:, None])
            value = tl.load(values + place[:, None] + dims[None, :], mask=here[:, None], other=0)
            norm = norm * shrink + tl.sum(weight, 1)
            if IN_CODES:
                half = (weight * value_scale[None, :]).to(tl.float16)
                total = tl.dot(half, even_dims(value, INTEGERS, ASM), total * shrink[:, None])
                odd = tl.dot(half, odd_dims(value, INTEGERS, ASM), odd * shrink[:, None])
            else:
                total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
            maximum = higher
        if IN_CODES:
            total = tl.reshape(tl.join(total, odd), [GP, D]) * (UNIT / WEIGHT_UNIT)
        output_row = row.to(tl.int64) * (KV_HEADS * G * D)
        if splits == 1:
            divisor = tl.where(norm == 0.0, 1.0, norm)[:, None]  # a row without context gets zeros
            if WIDE:
                heads = (line_of * (KV_HEADS * G * D) + (head * G + group % G) * D)[:, None] + dim[None, :]
                output_row = output_row * 0
            else:
                heads = (head * G + group)[:, None] * D + dim[None, :]
            tl.store(output + output_row + heads, (total / divisor).to(output.dtype.element_ty), mask=in_group)
        else:
            first_place = (row * KV_HEADS + head) * SPLITS
            members = G * width if WIDE else G
            place = (first_place + split) * members + group
            tl.store(sums + place[:, None] * D + dim[None, :], total, mask=in_group)
            tl.store(maxima_and_norms + place * 2, maximum, mask=group < members)
            tl.store(maxima_and_norms + place * 2 + 1, norm, mask=group < members)
            tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
            before = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if before == splits - 1:
                output_group = output_row * (width if WIDE else 1) + head * G * D
                if WIDE:
                    _merge_wide(
                        output, sums, maxima_and_norms, first_place, splits, output_group, G, members, KV_HEADS * G, D,
                        GP, SPLITS,
                    )  # fmt: skip
                else:
                    _merge(output, sums, maxima_and_norms, first_place, splits, output_group, G, D, MERGED)
                tl.store(arrived + row * KV_HEADS + head, 0)


def decode_attention(
    query: Tensor,
    cache: LayerCache,
    page_table: Tensor,
    context_lengths: Tensor,
    order: Tensor,
    scratch: DecodeScratch,
    output: Tensor,
    *,
    tiles: DecodeTiles,
    pdl: bool,
    new: NewTokens | None = None,
    positions: Tensor | None = None,
) -> None:
    """Fill `output`, [R, heads x D], for query of the same shape.

    new: query is [R, (heads + 2 x kv heads) x D] instead, with keys and values as yet neither normalised nor stored;
    what `rope_store` does is done first.

    positions: [R x N] int32, where rows have N tokens each: query and output are [R x N, ...] then, and each token sees
    what is not behind its position. Their keys and values are stored already.

    page_table: [R or more, pages] int32;
    context_lengths: [R or more] int32, the new token included, 0 for a row that is none. order: [R] int32, the rows
    in the order to take them, or NO_ROW: lines of `output` whose row is not listed stay as they are. tiles: how to cut,
    see `choose_tiles`.
    """
    rows, width = len(order), output.shape[1]
    tokens = len(output) // max(rows, 1)
    keys, values, head_dim = cache.keys, cache.values, cache.head_dim
    page_size, kv_heads, elements = keys.shape[1:]
    group = width // (kv_heads * head_dim)
    assert keys.stride() == values.stride()
    assert keys.stride(3) == query.stride(1) == output.stride(1) == page_table.stride(1) == 1
    assert len(output) == rows * tokens
    assert (tokens == 1) or (positions is not None and new is None)
    assert len(output) * kv_heads * group * tiles.splits <= len(scratch.sums) or tiles.splits == 1
    assert query.shape[1] == (width if new is None else width + 2 * kv_heads * head_dim)
    fresh: tuple[Tensor | float, ...] = (query, query, query, query, query, query, query, 0.0, 0.0, 0)
    if new is not None:
        assert new.cos.stride() == new.sin.stride() == (new.cos.stride(0), 1)
        codes = (x.view(torch.int8) if cache.in_codes else x for x in (keys, values))
        fresh = (
            new.query_norm, new.key_norm, new.cos, new.sin, new.slots, *codes, *new.eps, new.cos.stride(0)
        )  # fmt: skip
    options = {"launch_pdl": True} if pdl else {}
    heads = max(16, triton.next_power_of_2(group * tokens))
    _decode_attention[(kv_heads, rows, tiles.splits)](
        query, keys, values, output, page_table, context_lengths, order,
        scratch.sums, scratch.maxima_and_norms, scratch.arrived, *cache.scale_arguments[:2],
        query.stride(0), page_table.stride(0), *keys.stride()[:3], cache.scale_arguments[2], head_dim**-0.5 * LOG2_E,
        *fresh, context_lengths if positions is None else positions, tokens,
        SPLITS=tiles.splits, PAGE=page_size, BLOCK=tiles.keys, G=group, GP=heads,
        KV_HEADS=kv_heads, D=head_dim, W=elements, STAGES=tiles.stages,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", UNIT=cache.unit, IN_CODES=cache.in_codes,
        INTEGERS=cache.integers, ASM=query.is_cuda, PDL=pdl, FRESH=new is not None,
        WIDE=positions is not None,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip
