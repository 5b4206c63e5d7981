"""A mixture of experts without the host: choose, sort pairs by expert, two grouped products, add up.

Legend: T tokens of H numbers, K experts a token of E in all, I an expert's inner width, P = T x K (token, expert)
pairs; pair p is of token p // K. A rank has experts first .. first + its number of them, whole or a part of each I.

How many rows an expert gets only the device knows, so there are as many places for tiles as there may be tiles, and a
program whose place is empty ends. The places of expert e begin at `pairs before it // rows a tile + e`, which leaves
room for each one's last tile. Where every expert has one tile at most, they are close together instead.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SORT_BLOCK = 1024  # pairs
TILE_INTS = 3  # expert or -1, its tile's first row in the order, the end of its rows
SCALE_BLOCK = tl.constexpr(128)  # outputs and inputs that share a scale
FEW_PAIRS = 128  # up to here, a program may look at all pairs and experts at once


@dataclass(frozen=True)
class ExpertTiles:
    """How the products are cut. rows: of a tile; gate_up, down: (outputs, inputs a step, warps, pipeline stages)."""

    rows: int
    gate_up: tuple[int, int, int, int]
    down: tuple[int, int, int, int]


def choose_expert_tiles(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> ExpertTiles:
    """By how many rows an expert has on average; tuned on an H200 for 128 experts of 768, 8 a token."""
    mean = tokens * top_k / experts
    if dtype == torch.float32:
        return ExpertTiles(16, (32, 32, 4, 2), (32, 32, 4, 2))
    if mean <= 4:
        return ExpertTiles(16, (32, 128, 4, 4), (64, 128, 4, 3))
    if mean <= 20:
        return ExpertTiles(32, (64, 128, 4, 3), (128, 128, 4, 3))
    if mean <= 48:
        return ExpertTiles(64, (128, 64, 8, 3), (128, 64, 4, 4))
    return ExpertTiles(128, (128, 64, 8, 3), (128, 64, 8, 3))


@triton.jit
def _route(
    scores, weights, experts, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    NORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a token. EP, KP: E and K rounded up to powers of two."""
    row = tl.program_id(0)
    expert = tl.arange(0, EP)
    place = tl.arange(0, KP)
    inside = expert < E
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    score = tl.load(scores + row * E + expert, mask=inside, other=-float("inf")).to(tl.float32)
    exponential = tl.exp(score - tl.max(score, 0))
    total = tl.sum(exponential, 0)
    # A token whose scores are no numbers gets experts like any other, K different ones, and weights that are none.
    left = tl.where(inside, tl.where(exponential == exponential, exponential, 0.0), -1.0)
    chosen = tl.full([KP], 0, tl.int32)
    weight = tl.zeros([KP], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(left, 0)
        at = tl.min(tl.where(left == best, expert, EP), 0)
        chosen = tl.where(place == k, at, chosen)
        weight = tl.where(place == k, best, weight)
        left = tl.where(expert == at, -1.0, left)
    weight = weight / (tl.sum(weight, 0) + (total - total) if NORMALIZE else total)
    tl.store(weights + row * K + place, weight.to(weights.dtype.element_ty), mask=place < K)
    tl.store(experts + row * K + place, chosen, mask=place < K)


@triton.jit
def _sort_pairs(
    experts, order, tiles, pairs, places, first, ROWS: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr,
    BLOCK: tl.constexpr, ONE_TILE_EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program an expert of this rank's COUNT: its pairs' places in the order, its tiles'. BLOCK: all pairs, with
    ONE_TILE_EACH."""
    expert = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    before = tl.full([], 0, tl.int32)
    count = tl.full([], 0, tl.int32)
    for start in range(0, pairs, BLOCK):
        local = tl.load(experts + start + number, mask=start + number < pairs, other=-1) - first
        before += tl.sum(((local >= 0) & (local < expert)).to(tl.int32), 0)
        count += tl.sum((local == expert).to(tl.int32), 0)
    if ONE_TILE_EACH:
        local = tl.load(experts + number, mask=number < pairs, other=-1) - first
        other = tl.arange(0, COUNT_P)
        present = tl.max((local[None, :] == other[:, None]).to(tl.int32), 1)
        place = tl.sum(tl.where(other < expert, present, 0), 0)
        end = place + tl.minimum(count, 1)
    else:
        place = before // ROWS + expert
        end = (before + count) // ROWS + expert + 1
    if expert == COUNT - 1:
        end = places
    row = before
    for slot in range(place, end):
        here = row < before + count
        tl.store(tiles + slot * 3, tl.where(here, expert, -1))
        tl.store(tiles + slot * 3 + 1, row)
        tl.store(tiles + slot * 3 + 2, before + count)
        row += ROWS
    done = before
    for start in range(0, pairs, BLOCK):
        local = tl.load(experts + start + number, mask=start + number < pairs, other=-1) - first
        hit = local == expert
        to = done + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(order + to, start + number, mask=hit)
        done += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _grouped(
    x, matrices, scales, order, tiles, output, blocks, K: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program BLOCK_N outputs of N of a tile. SCALED: by `scales` for blocks of SCALE_BLOCK outputs and inputs, in
    one of which BLOCK_N and BLOCK_H lie. SILU: rows of `x` [T, H] by the pairs of the order, and output in the
    order, silu(first N) times second N; else x in the order, and output by pair."""
    place = tl.program_id(0) // blocks
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(tiles + place * 3)
    if expert >= 0:
        row = tl.load(tiles + place * 3 + 1) + tl.arange(0, BLOCK_M)
        real = row < tl.load(tiles + place * 3 + 2)
        pair = tl.load(order + row, mask=real, other=0)
        if SILU:
            source = (pair // K).to(tl.int64)
            target = row.to(tl.int64)
            matrix = matrices + expert.to(tl.int64) * (2 * N * H)
        else:
            source = row.to(tl.int64)
            target = pair.to(tl.int64)
            matrix = matrices + expert.to(tl.int64) * (N * H)
        out = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        there = out < N
        scale = scales + (expert * (2 if SILU else 1) * N + tl.program_id(0) % blocks * BLOCK_N) // SCALE_BLOCK * (
            H // SCALE_BLOCK
        )
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_H)
            inside = (column < H)[None, :]
            a = tl.load(x + source[:, None] * H + column[None, :], mask=real[:, None] & inside, other=0.0)
            w = tl.load(matrix + out[:, None] * H + column[None, :], mask=there[:, None] & inside, other=0.0)
            if SCALED:
                here = scale + start // SCALE_BLOCK
                total += tl.dot(a, w.to(a.dtype).T, input_precision=PRECISION) * tl.load(here)
            else:
                total = tl.dot(a, w.T, total, input_precision=PRECISION)
            if SILU:
                w = tl.load(matrix + (out + N)[:, None] * H + column[None, :], mask=there[:, None] & inside, other=0.0)
                if SCALED:
                    factor = tl.load(here + N // SCALE_BLOCK * (H // SCALE_BLOCK))
                    up += tl.dot(a, w.to(a.dtype).T, input_precision=PRECISION) * factor
                else:
                    up = tl.dot(a, w.T, up, input_precision=PRECISION)
        if SILU:
            total = total / (1.0 + tl.exp(-total)) * up
        to = output + target[:, None] * N + out[None, :]
        tl.store(to, total.to(output.dtype.element_ty), mask=real[:, None] & there[None, :])


@triton.jit
def _combine(
    rows, weights, experts, output, first, COUNT: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of N): the weighted sum of a token's rows, [K, N], of this rank's experts."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        local = tl.load(experts + token * K + k) - first
        here = (local >= 0) & (local < COUNT)
        value = tl.load(rows + (token * K + k) * N + column, mask=inside & here, other=0.0).to(tl.float32)
        total += tl.where(here, tl.load(weights + token * K + k).to(tl.float32) * value, 0.0)
    tl.store(output + token * N + column, total.to(output.dtype.element_ty), mask=inside)


def route(scores: Tensor, top_k: int, *, normalize: bool, pdl: bool) -> tuple[Tensor, Tensor]:
    """[T, E] -> weights [T, K] in its dtype, experts [T, K] int32: softmax, the K largest, the lowest ids of equals."""
    tokens, count = scores.shape
    weights = scores.new_empty((tokens, top_k))
    experts = torch.empty((tokens, top_k), dtype=torch.int32, device=scores.device)
    assert scores.is_contiguous()
    _route[(tokens,)](
        scores, weights, experts, E=count, EP=triton.next_power_of_2(count), K=top_k,
        KP=triton.next_power_of_2(top_k), NORMALIZE=normalize, PDL=pdl, num_warps=1, **_options(pdl),
    )  # fmt: skip
    return weights, experts


def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, first: int, tiles: ExpertTiles,
    *, pdl: bool, scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[T, H] -> [T, H]: what this rank's experts, and parts of experts, make of the tokens, weighted and added up.

    weights, experts: as `route` gives them, K different experts a token. gate_up: [experts, 2 x I, H], down:
    [experts, H, I] of the experts from `first` on; with scales these are codes in e4m3, of which each block of
    SCALE_BLOCK x SCALE_BLOCK has an fp32: [experts, 2 x I / SCALE_BLOCK, H / SCALE_BLOCK] and likewise.
    """
    tokens, hidden = x.shape
    count, inner = down.shape[0], down.shape[2]
    top_k = experts.shape[1]
    pairs = tokens * top_k
    assert x.is_contiguous()
    assert gate_up.shape == (count, 2 * inner, hidden)
    one_tile_each = tokens <= tiles.rows and pairs <= FEW_PAIRS
    places = min(pairs, count) if one_tile_each else pairs // tiles.rows + count
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    table = torch.empty((places, TILE_INTS), dtype=torch.int32, device=x.device)
    _sort_pairs[(count,)](
        experts, order, table, pairs, places, first, ROWS=tiles.rows, COUNT=count,
        COUNT_P=triton.next_power_of_2(count), ONE_TILE_EACH=one_tile_each, PDL=pdl, num_warps=4,
        BLOCK=min(SORT_BLOCK, triton.next_power_of_2(pairs)), **_options(pdl),
    )  # fmt: skip
    activated, rows = x.new_empty((pairs, inner)), x.new_empty((pairs, hidden))
    for source, matrices, target, silu in ((x, gate_up, activated, True), (activated, down, rows, False)):
        outputs, inputs, warps, stages = tiles.gate_up if silu else tiles.down
        width, depth = target.shape[1], matrices.shape[2]
        blocks = triton.cdiv(width, outputs)
        assert matrices.is_contiguous()
        factors = x
        if scales is not None:
            factors = scales[0 if silu else 1]
            assert width % SCALE_BLOCK.value == depth % SCALE_BLOCK.value == 0
            assert factors.shape == (count, *(side // SCALE_BLOCK.value for side in matrices.shape[1:]))
            assert factors.is_contiguous()
        _grouped[(places * blocks,)](
            source, matrices, factors, order, table, target, blocks, K=top_k, N=width, H=depth, BLOCK_M=tiles.rows,
            BLOCK_N=outputs, BLOCK_H=inputs, STAGES=stages, SILU=silu, SCALED=scales is not None, PDL=pdl,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, **_options(pdl),
        )  # fmt: skip
    output = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, block))](
        rows, weights, experts, output, first, COUNT=count, K=top_k, N=hidden, BLOCK=block, PDL=pdl, num_warps=4,
        **_options(pdl),
    )  # fmt: skip
    return output


def _options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}
