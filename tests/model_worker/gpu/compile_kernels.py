"""Compiles the kernels for a card of compute capability 9.0 without one, as the 0.6B shape launches them.

A script of its own, since Triton chooses between its interpreter and its compiler when it is imported; writes a line a
kernel. What the interpreter takes the compiler may refuse: a variable that changes its shape in one branch, say.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.internal.gpu_timing import NoCard
from vibe_sgl_lite.model_worker.gpu.block_experts import BlockExperts
from vibe_sgl_lite.model_worker.gpu.fused_layers import TILES
from vibe_sgl_lite.model_worker.gpu.grouped_matrix import choose_tiles as choose_grouped_tiles
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Layout, Outbox, all_gather, all_reduce
from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import FEW_HEADS, chain_attention, choose_chain_tiles
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (
    DecodeScratch,
    NewTokens,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm, begin, silu_multiply
from vibe_sgl_lite.model_worker.gpu.kernels.expand_rows import expand_rows
from vibe_sgl_lite.model_worker.gpu.kernels.experts import choose_expert_tiles, route, run_experts
from vibe_sgl_lite.model_worker.gpu.kernels.fp8_product import encode_groups
from vibe_sgl_lite.model_worker.gpu.kernels.gemv import gemv
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_gemv import GEMV_OUTPUTS, GemvTiles, grouped_gemv
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import (
    MANTISSA,
    GroupedCodes,
    grouped_product,
    plain_matrix,
)
from vibe_sgl_lite.model_worker.gpu.kernels.prefill_attention import (
    FEW_TOKENS,
    SOME_TOKENS,
    choose_prefill_tiles,
    prefill_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.product import (
    ProductScratch,
    added_product,
    begin_stream,
    normed_product,
)
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import rank_product
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import rope_store
from vibe_sgl_lite.model_worker.gpu.kernels.sample import num_chunks, sample
from vibe_sgl_lite.model_worker.gpu.kernels.speculate import accept, expand_drafts, look_up
from vibe_sgl_lite.model_worker.gpu.rank_products import choose_cut
from vibe_sgl_lite.qwen3.layers.parallel_state import Group

KV_HEADS, GROUP, DIM, HIDDEN, INNER, VOCAB = 8, 2, 128, 1024, 3072, 151_936
PAGE, PAGES, ROWS = 64, 4, 8


def compile_only(kernel: JITFunction[Any], grid: tuple[int, ...]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        if "ASM" in options:
            options["ASM"] = True  # as for tensors on a card
        elif "MANTISSA_BITS" in options:
            options["MANTISSA_BITS"] = MANTISSA[args[0].dtype]
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        sys.stdout.write(f"{kernel.fn.__name__} {compiled.metadata.shared} bytes of shared memory\n")

    return call


class OneOf(Group):
    """The first of some ranks, none of which runs."""

    def __init__(self, size: int) -> None:
        object.__setattr__(self, "rank", 0)
        object.__setattr__(self, "size", size)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(self.size, 1)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def caches() -> list[LayerCache]:
    pool = zeros(2, PAGES, PAGE, KV_HEADS, DIM)
    codes = zeros(2, PAGES, PAGE, KV_HEADS, DIM, dtype=torch.int8)
    scales = zeros(2, PAGES, KV_HEADS, PAGE, dtype=torch.float32)
    in_codes = [LayerCache.of_codes(*codes, *scales, integers=integers) for integers in (False, True)]
    return [LayerCache(pool[0], pool[1]), *in_codes]


def main() -> None:
    driver.set_active(NoCard())
    JITFunction.__getitem__ = compile_only
    ints, longs = zeros(ROWS + 1, dtype=torch.int32), zeros(ROWS + 1, dtype=torch.int64)
    table = zeros(ROWS, PAGES, dtype=torch.int32)
    query, output = zeros(2, ROWS, KV_HEADS * GROUP * DIM)
    qkv = zeros(ROWS, (GROUP + 2) * KV_HEADS * DIM)
    angles, norm = zeros(ROWS, DIM // 2), zeros(DIM)
    scratch = DecodeScratch(KV_HEADS, FEW_HEADS + 2, DIM, query.device, places=ROWS * 64)
    for cache in caches():
        dtype = torch.int8 if cache.in_codes else torch.bfloat16
        for rows in (4, 256):
            tiles = choose_tiles(rows, KV_HEADS, dtype, 1)
            wide = choose_tiles(rows, KV_HEADS, dtype, 1, wide=True)
            rest = cache, table, ints, ints[:ROWS], scratch, output
            decode_attention(query, *rest, tiles=tiles, pdl=True)
            new = NewTokens(norm, norm, (1e-6, 1e-6), angles, angles, longs)
            decode_attention(qkv, *rest, tiles=tiles, pdl=True, new=new)
            for order in (ints[:2], ints[:1]):  # rows of 4 and of 8 tokens
                decode_attention(
                    query, cache, table, ints, order, scratch, output, tiles=wide, pdl=True, positions=ints
                )  # fmt: skip
        for tokens in (1, FEW_TOKENS + 1, SOME_TOKENS + 1):
            cut = choose_prefill_tiles(tokens, GROUP, dtype)
            tile, fresh = zeros(2, 2, dtype=torch.int32), qkv if cache.in_codes else None
            prefill_attention(query, cache, table, ints, ints, tile, cut, output, pdl=True, fresh=fresh)
        for keep in (False, True):
            rope_store(qkv, norm, norm, (1e-6, 1e-6), angles, angles, longs, cache, query, pdl=True, keep=keep)
        for group in () if cache.in_codes else (GROUP, FEW_HEADS + 2):
            packed, attended = zeros(ROWS, (group + 2) * KV_HEADS * DIM), zeros(ROWS, group * KV_HEADS * DIM)
            chain_attention(
                packed, norm, norm, (1e-6, 1e-6), angles, angles, longs, cache.keys, cache.values, table, ints, scratch,
                attended, tiles=choose_chain_tiles(1, group), pdl=True,
            )  # fmt: skip
    stream, gain = zeros(2, HIDDEN), zeros(HIDDEN)
    outbox = Outbox(longs[:2], longs[:2], Layout(1 << 16, 1 << 20, 2), 1)
    gemv(stream, zeros(2 * INNER, HIDDEN), zeros(2, INNER), pdl=True, block=16, warps=8, gain=gain, eps=1e-6, silu=True)
    gemv(zeros(2, INNER), zeros(HIDDEN, INNER), stream, pdl=True, block=8, warps=4, addend=stream)
    gemv(zeros(2, INNER), zeros(HIDDEN, INNER), stream, pdl=True, block=8, warps=4, outbox=outbox)
    add_rms_norm(stream, stream, gain, 1e-6, stream, pdl=True)
    silu_multiply(zeros(2, 2 * INNER), zeros(2, INNER), pdl=True)
    begin(
        ints[:2],
        ints[:2],
        zeros(16, HIDDEN),
        zeros(9, 2, DIM // 2),
        stream,
        zeros(2, HIDDEN),
        zeros(2, 2, DIM // 2),
        pdl=True,
    )
    regions = longs[:2], longs[:2], Layout(1 << 16, 0, 2), 1
    small = longs[:2], longs[:2], Layout(1 << 16, 1 << 16, 2), 1
    all_reduce(stream, *regions, pdl=True)
    all_gather(stream, zeros(2, *stream.shape), *small, pdl=True)
    all_reduce(stream, *small, pdl=True, residual=stream, weight=gain, eps=1e-6)
    all_reduce(stream, *small, pdl=True, sent=True, beside=True, residual=stream, weight=gain, eps=1e-6)
    all_reduce(stream, *small, pdl=True, sent=True, residual=stream)
    all_reduce(stream, *regions, pdl=True, two_shot=True, residual=stream, weight=gain, eps=1e-6)
    experts = zeros(16, 2 * INNER, HIDDEN), zeros(16, HIDDEN, INNER), 0
    coded = BlockExperts.of(experts[0]), BlockExperts.of(experts[1])
    for tokens in (1, 32, 64, 128):
        weights, chosen = route(zeros(tokens, 16), 8, normalize=True, pdl=True)
        expert_tiles = choose_expert_tiles(tokens, 8, 16, stream.dtype)
        run_experts(zeros(tokens, HIDDEN), weights, chosen, *experts, expert_tiles, pdl=True)
        factors = coded[0].scales, coded[1].scales
        in_fp8 = coded[0].codes, coded[1].codes, 0
        run_experts(zeros(tokens, HIDDEN), weights, chosen, *in_fp8, expert_tiles, pdl=True, scales=factors)
    sums = ProductScratch(stream.device, 1 << 21, 1 << 10)
    for most, cuts in (TILES[0], TILES[-2]):
        squares = zeros(most, HIDDEN // cuts.down.outputs, dtype=torch.float32)
        stream, gained = zeros(2, most, HIDDEN)
        begin_stream(stream, gain, gained, squares, pdl=True)
        inner, matrix = zeros(most, INNER), zeros(2 * INNER, HIDDEN)
        normed_product(gained, squares, 1e-6, matrix, inner, cuts.gate_up, sums, pdl=True, silu=True)
        down = zeros(HIDDEN, INNER)
        added_product(inner, down, stream, gain, gained, squares, cuts.down, sums, pdl=True)
    for bits, plane in ((4, 32), (8, 64)):
        words = zeros(2 * HIDDEN, 2048 * bits // 16, dtype=torch.int16)
        scales = zeros(2 * HIDDEN // 8, 16, 8, dtype=torch.int32 if bits == 4 else torch.float32)
        codes = GroupedCodes(words, scales, None, 2 * HIDDEN, 2048, bits, plane, 128)
        x, silu, stream, norms = (zeros(1, width) for width in (2048, HIDDEN, 2 * HIDDEN, 2 * HIDDEN))
        for few_cut in (GemvTiles(16, 4), GemvTiles(16, 8, 8, 64, 2), GemvTiles(8, 8), GemvTiles(8, 4, splits=2)):
            parts = zeros(1, 40, dtype=torch.float32)
            grouped_gemv(x, codes, silu, few_cut, sums, pdl=True, squares=parts, eps=1e-6, silu=True)
            parts = zeros(1, 2 * HIDDEN // GEMV_OUTPUTS, dtype=torch.float32)
            grouped_gemv(x, codes, stream, few_cut, sums, pdl=True, gain=norms, gained=norms, new_squares=parts)
        for most in (8, 32):
            x, silu = zeros(most, 2048), zeros(most, HIDDEN)
            grouped_cut, parts = choose_grouped_tiles(most, 2 * HIDDEN, 16), zeros(most, 40, dtype=torch.float32)
            grouped_product(x, codes, silu, grouped_cut, sums, pdl=True, squares=parts, eps=1e-6, silu=True)
            parts = zeros(most, 2 * HIDDEN // grouped_cut.outputs, dtype=torch.float32)
            stream = zeros(most, 2 * HIDDEN)
            grouped_product(x, codes, stream, grouped_cut, sums, pdl=True, gain=x, gained=x, new_squares=parts)
        plain_matrix(codes, torch.bfloat16, pdl=True)
    encode_groups(x, zeros(32, 2048, dtype=torch.float8_e4m3fn), zeros(16, 32, dtype=torch.float32), pdl=True)
    for rows in (16, 32, 64, 128):  # as one of two ranks of the 8B shape
        for outputs, inputs, gated in ((4096, 6144, False), (6144, 4096, True)):
            rank_cut = choose_cut(rows, outputs, inputs, stream.dtype, silu=gated)
            if rank_cut is not None:
                matrix, box = zeros(outputs * (2 if gated else 1), inputs), None if gated else outbox
                result = zeros(rows, outputs)
                rank_product(zeros(rows, inputs), matrix, result, rank_cut, sums, pdl=True, silu=gated, outbox=box)
    slots, tokens_of = ints[:2], zeros(ROWS, 100, dtype=torch.int32)
    expand_rows(longs[:2], slots, tokens_of, table, slots, slots, longs, table, longs, longs, PAGE, PAGES)
    look_up(longs[:2], slots, slots, ints, tokens_of, slots, slots, 12)
    laid_out = ints[:8], ints[:8], longs[:8], table, slots, longs[:8], longs[:8], longs[:8]
    expand_drafts(longs[:2], slots, slots, tokens_of, table, *laid_out, PAGE, PAGES)
    accept(ints[:8], ints[:8], longs[:2], slots, slots, ints, zeros(12, dtype=torch.int32))
    logits, temperatures = zeros(2, VOCAB), zeros(ROWS, dtype=torch.float64)
    chunks = zeros(2 * num_chunks(VOCAB), dtype=torch.float32)
    filters = ints, temperatures, temperatures
    for ranks in (Group(), *map(OneOf, (2, 8))):
        sample(
            logits, slots, longs[:2], temperatures, longs, filters, chunks, slots, tokens_of, longs[:2], slots,
            pdl=True, group=ranks,
        )  # fmt: skip


if __name__ == "__main__":
    main()
