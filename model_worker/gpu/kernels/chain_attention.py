"""Attention of a decode step of few rows, with all that lies around it: norm, rotation and storing of the new token.

What a chain of dependent launches needs: many short splits of the context, and each program's first keys and values on
their way before the kernel before this one has ended. One or two query heads a KV head cannot fill matrix instructions,
and do without; more of them go through those all at once, where one by one they take as often as long. The new token's
key and value come from registers: the softmax starts with them. See decode_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import LOG2_E, MERGED, DecodeScratch, DecodeTiles, _merge

CHAIN_ROWS = 4  # at most
FEW_CHAIN_ROWS = 2  # the same where there are five kernels a layer for more of them (fused_layers.py)
# By the longest context that they are for; measured on an H100 at contexts of 256, 384 and 850.
TILES = (
    (320, DecodeTiles(16, 1, 1, 64)),
    (640, DecodeTiles(32, 2, 1, 32)),
    (2**31, DecodeTiles(64, 4, 1, 16)),
)
FEW_HEADS = 2  # query heads a KV head, up to which they come one by one
GROUP_TILES = ((2**31, DecodeTiles(64, 2, 1, 16)),)  # with more of them; at four, and contexts of 300, 988 and 2,000
MERGED_HEADS = tl.constexpr(64)  # partial results of heads that are added up at once
CHAIN_SPLITS = max(tiles.splits for _, tiles in (*TILES, *GROUP_TILES))


def choose_chain_tiles(max_context: int, group: int) -> DecodeTiles:
    """The tiles for contexts of up to so many tokens, and so many query heads a KV head."""
    return next(tiles for most, tiles in _tiles_of(group) if max_context <= most)


def chain_contexts(group: int) -> tuple[int, ...]:
    """One context for each of these tiles."""
    return tuple(min(most, 4096) for most, _ in _tiles_of(group))


def _tiles_of(group: int) -> tuple[tuple[int, DecodeTiles], ...]:
    return GROUP_TILES if group > FEW_HEADS else TILES


@triton.jit
def _turned_head(start, gain, pair_gain, cos, sin, eps, D: tl.constexpr):
    """[D] fp32, rounded to the model's dtype: one head over its rms, times gain, rotated; pair: dimension i + D / 2."""
    dim = tl.arange(0, D)
    x = tl.load(start + dim)
    dtype = x.dtype
    x = x.to(tl.float32)
    other = tl.load(start + (dim + D // 2) % D).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    x = (x * factor * gain).to(dtype).to(tl.float32)
    other = (other * factor * pair_gain).to(dtype).to(tl.float32)
    return (x * cos + other * sin).to(dtype).to(tl.float32)


@triton.jit
def _places(table, token, here, head, page_stride, token_stride, head_stride, PAGE: tl.constexpr):
    page = tl.load(table + token // PAGE, mask=here, other=0).to(tl.int64)
    return page * page_stride + (token % PAGE) * token_stride + head * head_stride


@triton.jit
def _lines(pool, place, here, D: tl.constexpr):
    """Keys or values of a block: [BLOCK, D], zeros where it is not `here`."""
    return tl.load(pool + place[:, None] + tl.arange(0, D)[None, :], mask=here[:, None], other=0.0)


@triton.jit
def _part(length, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many splits a context has, and where this one begins and ends, of what is cached already."""
    each = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK), 1) * BLOCK
    return tl.maximum(tl.cdiv(length, each), 1), split * each, tl.minimum(split * each + each, length - 1)


@triton.jit
def _angles(cosines, sines, place, D: tl.constexpr):
    """fp32 [D]: the cosines of a position's angles, and its sines as the first half of a head takes them."""
    dim = tl.arange(0, D)
    angle = place + dim % (D // 2)
    cos = tl.load(cosines + angle).to(tl.float32)
    return cos, tl.load(sines + angle).to(tl.float32) * tl.where(dim < D // 2, -1.0, 1.0)


@triton.jit
def _attend(query, key, value, here, maximum, norm, total):
    """One block of keys into the running softmax of one query head."""
    score = tl.where(here, tl.sum(key.to(tl.float32) * query[None, :], 1), -float("inf"))
    higher = tl.maximum(maximum, tl.max(score, 0))
    weight = tl.exp2(score - higher)
    shrink = tl.exp2(maximum - higher)
    norm = norm * shrink + tl.sum(weight, 0)
    return higher, norm, total * shrink + tl.sum(weight[:, None] * value.to(tl.float32), 0)


@triton.jit
def _chain_attention(
    qkv, query_norm, key_norm, cosines, sines, slots, keys, values, output, page_table, context_lengths,
    sums, maxima_and_norms, arrived, query_eps, key_eps, table_stride, angle_stride,
    page_stride, token_stride, head_stride, scale,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, R, SPLITS)."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    dim = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
    splits, start, end = _part(tl.load(context_lengths + row), split, SPLITS, BLOCK)
    table = page_table + row.to(tl.int64) * table_stride
    token = start + tl.arange(0, BLOCK)
    here = token < end
    place = _places(table, token, here, head, page_stride, token_stride, head_stride, PAGE)
    first_key = _lines(keys, place, here, D)
    first_value = _lines(values, place, here, D)
    pair = (dim + D // 2) % D
    gain = tl.load(query_norm + dim).to(tl.float32)
    pair_gain = tl.load(query_norm + pair).to(tl.float32)
    key_gain = tl.load(key_norm + dim).to(tl.float32)
    key_pair_gain = tl.load(key_norm + pair).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    if PDL:
        gdc_wait()
    cos, sin = _angles(cosines, sines, row * angle_stride, D)  # in the first layer just made
    if split < splits:
        line = qkv + row.to(tl.int64) * ((G + 2) * KV_HEADS * D)
        is_last = split == splits - 1
        new_key = tl.zeros([D], tl.float32)
        new_value = tl.zeros([D], tl.float32)
        if is_last:
            new_key = _turned_head(line + (G * KV_HEADS + head) * D, key_gain, key_pair_gain, cos, sin, key_eps, D)
            value_line = tl.load(line + ((G + 1) * KV_HEADS + head) * D + dim)
            new_value = value_line.to(tl.float32)
            new_place = slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride + dim
            tl.store(keys + new_place, new_key.to(keys.dtype.element_ty))
            tl.store(values + new_place, value_line)
        for member in tl.static_range(G):
            query_line = line + (head * G + member) * D
            query = _turned_head(query_line, gain, pair_gain, cos, sin, query_eps, D) * scale
            maximum = -1e30
            norm = 0.0
            total = tl.zeros([D], tl.float32)
            if is_last:
                maximum = tl.sum(query * new_key, 0)
                norm = 1.0
                total = new_value
            maximum, norm, total = _attend(query, first_key, first_value, here, maximum, norm, total)
            for first in tl.range(start + BLOCK, end, BLOCK, num_stages=1):
                later = first + tl.arange(0, BLOCK)
                inside = later < end
                spot = _places(table, later, inside, head, page_stride, token_stride, head_stride, PAGE)
                key = _lines(keys, spot, inside, D)
                value = _lines(values, spot, inside, D)
                maximum, norm, total = _attend(query, key, value, inside, maximum, norm, total)
            output_line = (row.to(tl.int64) * KV_HEADS + head) * G + member
            if splits == 1:
                tl.store(output + output_line * D + dim, (total / norm).to(output.dtype.element_ty))
            else:
                spot = ((row * KV_HEADS + head) * SPLITS + split) * G + member
                tl.store(sums + spot * D + dim, total)
                tl.store(maxima_and_norms + spot * 2, maximum)
                tl.store(maxima_and_norms + spot * 2 + 1, norm)
        if splits > 1:
            tl.debug_barrier()
            before = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if before == splits - 1:
                first_place = (row * KV_HEADS + head) * SPLITS
                output_group = (row.to(tl.int64) * KV_HEADS + head) * G * D
                _merge(output, sums, maxima_and_norms, first_place, splits, output_group, G, D, MERGED)
                tl.store(arrived + row * KV_HEADS + head, 0)


@triton.jit
def _turned_heads(
    start, weight, cosines, sines, angle, eps, STRIDE: tl.constexpr, G: tl.constexpr, GM: tl.constexpr, D: tl.constexpr
):
    """[GM, D]: G heads from `start` on, STRIDE behind each other, as rope_store.py makes them, rounded. Gains and
    angles are loaded for each head: so they need not move between threads."""
    head, dim = tl.arange(0, GM)[:, None], tl.arange(0, D)[None, :]
    each = head * 0 + dim
    pair = head * 0 + (dim + D // 2) % D
    turn = head * 0 + angle + dim % (D // 2)
    x = tl.load(start + head * STRIDE + dim, mask=head < G, other=0.0)
    other = tl.load(start + head * STRIDE + (dim + D // 2) % D, mask=head < G, other=0.0).to(tl.float32)
    gain, pair_gain = tl.load(weight + each).to(tl.float32), tl.load(weight + pair).to(tl.float32)
    cos, sin = tl.load(cosines + turn).to(tl.float32), tl.load(sines + turn).to(tl.float32)
    sin = tl.where(dim < D // 2, -sin, sin)
    dtype = x.dtype
    x = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x = (x * factor * gain).to(dtype).to(tl.float32)
    other = (other * factor * pair_gain).to(dtype).to(tl.float32)
    return (x * cos + other * sin).to(dtype)


@triton.jit
def _attend_group(query, key, value, here, scale, maximum, norm, total, PRECISION: tl.constexpr):
    """One block of keys into the running softmaxes of all query heads of a KV head: [D, GP] and [BLOCK, D]. The heads
    are the matrix units' columns, of which they want 8; rows would be 16."""
    score = tl.dot(key, query, input_precision=PRECISION) * scale
    score = tl.where(here[:, None], score, -float("inf"))
    higher = tl.maximum(maximum, tl.max(score, 0))
    weight = tl.exp2(score - higher[None, :])
    shrink = tl.exp2(maximum - higher)
    norm = norm * shrink + tl.sum(weight, 0)
    total = tl.dot(tl.trans(value), weight.to(value.dtype), total * shrink[None, :], input_precision=PRECISION)
    return higher, norm, total


@triton.jit
def _merge_group(
    output, sums, maxima_and_norms, first, splits, G: tl.constexpr, GM: tl.constexpr, D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up the partial results of `splits` places from `first` on, of all heads of a group at once."""
    dim = tl.arange(0, D)
    member = tl.arange(0, GM)
    part = tl.arange(0, AT_ONCE)
    maximum = tl.full([GM], -1e30, tl.float32)
    norm = tl.zeros([GM], tl.float32)
    total = tl.zeros([GM, D], tl.float32)
    for begin in range(0, splits, AT_ONCE):
        here = (begin + part < splits)[:, None] & (member < G)[None, :]
        spot = (first + begin + part)[:, None] * G + member[None, :]
        maxima = tl.load(maxima_and_norms + spot * 2, mask=here, other=-float("inf"), cache_modifier=".cg")
        norms = tl.load(maxima_and_norms + spot * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
        partial = tl.load(
            sums + spot[:, :, None] * D + dim[None, None, :], mask=here[:, :, None], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(maximum, tl.max(maxima, 0))
        weight = tl.exp2(maxima - higher[None, :])
        shrink = tl.exp2(maximum - higher)
        norm = norm * shrink + tl.sum(weight * norms, 0)
        total = total * shrink[:, None] + tl.sum(weight[:, :, None] * partial, 0)
        maximum = higher
    result = (total / norm[:, None]).to(output.dtype.element_ty)
    tl.store(output + member[:, None] * D + dim[None, :], result, mask=(member < G)[:, None])


@triton.jit
def _group_attention(
    qkv, query_norm, key_norm, cosines, sines, slots, keys, values, output, page_table, context_lengths,
    sums, maxima_and_norms, arrived, query_eps, key_eps, table_stride, angle_stride,
    page_stride, token_stride, head_stride, scale,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_chain_attention` of groups of more heads, which the matrix units take all at once. Grid (KV_HEADS, R, SPLITS).
    GP: G rounded up to a matrix's least columns; GM: to a power of two."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    dim = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
    splits, start, end = _part(tl.load(context_lengths + row), split, SPLITS, BLOCK)
    table = page_table + row.to(tl.int64) * table_stride
    token = start + tl.arange(0, BLOCK)
    here = token < end
    place = _places(table, token, here, head, page_stride, token_stride, head_stride, PAGE)
    key = _lines(keys, place, here, D)
    value = _lines(values, place, here, D)
    slot = tl.load(slots + row).to(tl.int64)
    if PDL:
        gdc_wait()
    if split < splits:
        group, members = tl.arange(0, GP), tl.arange(0, GM)[:, None]
        line = qkv + row.to(tl.int64) * ((G + 2) * KV_HEADS * D)
        angle = row * angle_stride
        heads = _turned_heads(line + head * G * D, query_norm, cosines, sines, angle, query_eps, D, G, GM, D)
        # In each row the same.
        new_key = _turned_heads(
            line + (G * KV_HEADS + head) * D, key_norm, cosines, sines, angle, key_eps, 0, GM, GM, D
        )  # fmt: skip
        new_value = tl.load(line + ((G + 1) * KV_HEADS + head) * D + dim)
        is_last = split == splits - 1
        new_place = slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride
        tl.store(keys + new_place + members * 0 + dim[None, :], new_key, mask=is_last & (members == 0))
        tl.store(values + new_place + dim, new_value, mask=is_last)
        new_score = tl.sum(heads.to(tl.float32) * new_key.to(tl.float32), 1) * scale
        # Matrix instructions have GP columns: all heads again and again.
        query = tl.trans(tl.reshape(tl.broadcast_to(heads[None, :, :], [GP // GM, GM, D]), [GP, D]))
        new_score = tl.reshape(tl.broadcast_to(new_score[None, :], [GP // GM, GM]), [GP])
        maximum = tl.where(is_last, new_score, -1e30)
        norm = tl.where(is_last, tl.full([GP], 1.0, tl.float32), 0.0)
        total = tl.where(is_last, tl.broadcast_to(new_value.to(tl.float32)[:, None], [D, GP]), 0.0)
        maximum, norm, total = _attend_group(query, key, value, here, scale, maximum, norm, total, PRECISION)
        for first in tl.range(start + BLOCK, end, BLOCK, num_stages=1):
            later = first + tl.arange(0, BLOCK)
            inside = later < end
            spot = _places(table, later, inside, head, page_stride, token_stride, head_stride, PAGE)
            key = _lines(keys, spot, inside, D)
            value = _lines(values, spot, inside, D)
            maximum, norm, total = _attend_group(query, key, value, inside, scale, maximum, norm, total, PRECISION)
        in_group = group < G
        output_group = output + (row.to(tl.int64) * KV_HEADS + head) * G * D
        if splits == 1:
            result = (total / norm[None, :]).to(output.dtype.element_ty)
            tl.store(output_group + group[None, :] * D + dim[:, None], result, mask=in_group[None, :])
        else:
            first_place = (row * KV_HEADS + head) * SPLITS
            spot = (first_place + split) * G + group
            tl.store(sums + spot[None, :] * D + dim[:, None], total, mask=in_group[None, :])
            tl.store(maxima_and_norms + spot * 2, maximum, mask=in_group)
            tl.store(maxima_and_norms + spot * 2 + 1, norm, mask=in_group)
            tl.debug_barrier()  # all of this program's threads have stored before it counts as arrived
            before = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if before == splits - 1:
                _merge_group(output_group, sums, maxima_and_norms, first_place, splits, G, GM, D, MERGED_HEADS // GM)
                tl.store(arrived + row * KV_HEADS + head, 0)


def chain_attention(
    qkv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    eps: tuple[float, float],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    context_lengths: Tensor,
    scratch: DecodeScratch,
    output: Tensor,
    *,
    tiles: DecodeTiles,
    pdl: bool,
) -> None:
    """What `rope_store` and `decode_attention` do of R decode rows; a row without context gets some numbers.

    qkv: [R, (heads + 2 x kv heads) x D]; output: [R, heads x D]. The others as there.
    """
    rows, width = output.shape
    page_size, kv_heads, head_dim = keys.shape[1:]
    group = width // (kv_heads * head_dim)
    assert qkv.is_contiguous()
    assert output.is_contiguous()
    assert keys.stride() == values.stride()
    assert cos.stride() == sin.stride()
    assert rows * kv_heads * group * tiles.splits <= len(scratch.sums)
    options = {"launch_pdl": True} if pdl else {}
    heads: dict[str, int | str] = {"G": group, "KV_HEADS": kv_heads, "D": head_dim}
    kernel = _chain_attention
    if group > FEW_HEADS:
        kernel, whole = _group_attention, triton.next_power_of_2(group)
        precision = "ieee" if qkv.dtype == torch.float32 else "tf32"
        heads |= {"GP": max(8, whole), "GM": whole, "PRECISION": precision}
    kernel[(kv_heads, rows, tiles.splits)](
        qkv, query_norm, key_norm, cos, sin, slots, keys, values, output, page_table, context_lengths,
        scratch.sums, scratch.maxima_and_norms, scratch.arrived, *eps, page_table.stride(0), cos.stride(0),
        *keys.stride()[:3], head_dim**-0.5 * LOG2_E,
        SPLITS=tiles.splits, PAGE=page_size, BLOCK=tiles.keys, PDL=pdl, **heads,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip
