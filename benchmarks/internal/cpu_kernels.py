"""The CPU kernels against plain torch on Qwen3-0.6B's layer shape in bf16, and its linears in every format, with the
memory's read rate and the FMA rate beside them.

python benchmarks/internal/cpu_kernels.py [--threads N] [--seconds S] [--target avx2] [--only linear]
a table and one line of JSON

Every time is the best of many runs, each on memory that the caches no longer hold, all variants of a case in turn, and
the read rate is that of summing as many bytes: what else the machine does then meets all alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.internal.cpu_rates import fma_gflops
from vibe_sgl_lite.model_worker.cpu import CpuKernels, LayerCache, load
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat
from vibe_sgl_lite.model_worker.kv_int8 import SCALE_BYTES, quantize

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 16, 8, 128, 16
HIDDEN, INTERMEDIATE, EPS = 1024, 3072, 1e-6
SCALE = HEAD_DIM**-0.5
DECODE = ((1, 512), (8, 512), (8, 2048), (32, 512), (32, 2048))  # rows x context
CHUNKS = ((512, 512), (512, 1024), (512, 2048), (512, 4096), (128, 2048), (16, 2048), (8, 4096))  # new, context
FUSED = (1, 16, 512)  # tokens
LINEAR = (1, 4, 8, 16, 32, 512)  # rows
MATRICES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # outputs and inputs of a layer's linears
FORMATS = (WeightFormat.BF16, WeightFormat.INT8, WeightFormat.INT4)
KEEP_COLD_BYTES = 256 << 20  # data of all layers together, so that a layer has left the caches when its turn comes

Variants = dict[str, Callable[[int], object]]  # each called with the number of the layer to use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line of the table")
    parser.add_argument("--target", help="instruction set (model_worker/cpu/targets.py) in place of the best one")
    parser.add_argument("--only", choices=("decode", "chunk", "fused", "linear"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = load(target=args.target)
    if kernels is None:
        raise SystemExit("the kernels could not be built")
    torch.manual_seed(0)
    print(f"{kernels.instruction_set}, {kernels.threads} threads")
    result: dict[str, object] = {"instruction_set": kernels.instruction_set, "threads": kernels.threads}
    with torch.inference_mode():
        if args.only in (None, "decode"):
            result["decode"] = [decode(kernels, rows, context, args.seconds) for rows, context in DECODE]
        if args.only in (None, "chunk"):
            result["chunk"] = [chunk(kernels, new, context, args.seconds) for new, context in CHUNKS]
        if args.only in (None, "fused"):
            result["fused"] = [line for tokens in FUSED for line in fused(kernels, tokens, args.seconds)]
        if args.only in (None, "linear"):
            result["linear"] = linears(kernels, args.target, args.seconds)
    print(json.dumps(result))


def decode(kernels: CpuKernels, rows: int, context: int, seconds: float) -> dict[str, object]:
    """One new token a row, over a cache in bf16 and in int8. GB/s are of the keys and values read."""
    pages = rows * context // PAGE_SIZE
    caches, page_table = make_caches(pages, rows)
    int8_caches = make_int8_caches(caches)
    query = torch.randn(rows, HEADS, HEAD_DIM).bfloat16()
    start = torch.arange(rows + 1, dtype=torch.int32)
    lengths = torch.full((rows,), context, dtype=torch.int32)

    def ours(layer: int) -> Tensor:
        return kernels.paged_attention(query, caches[layer], start, lengths, page_table, SCALE)

    def int8(layer: int) -> Tensor:
        return kernels.paged_attention(query, int8_caches[layer], start, lengths, page_table, SCALE)

    def plain(layer: int) -> Tensor:
        return torch.cat([folded(query[r], *gather(caches[layer], page_table[r])) for r in range(rows)])

    check(int8(0).flatten(1), plain(0))
    check(ours(0).flatten(1), plain(0))
    moved = rows * context * KV_HEADS * HEAD_DIM * 2 * 2
    moved_int8 = rows * context * KV_HEADS * (HEAD_DIM + SCALE_BYTES) * 2
    blocks = HugeMemory().empty((len(caches), moved // 4), torch.float32).fill_(1)
    times = measure({"ours": ours, "int8": int8, "read": lambda layer: blocks[layer].sum()}, len(caches), seconds)
    times |= measure({"torch": plain}, len(caches), seconds / 4)
    rate, read, rate_int8 = moved / times["ours"] / 1e9, moved / times["read"] / 1e9, moved_int8 / times["int8"] / 1e9
    print(
        f"decode {f'{rows} x {context}':>12}: {times['ours'] * 1e6:8.0f} us a layer, torch {times['torch'] * 1e6:8.0f} "
        f"({times['torch'] / times['ours']:4.1f}x); {rate:5.1f} GB/s = {rate / read:4.0%} of the {read:.1f} read; "
        f"int8 {times['int8'] * 1e6:8.0f} us ({times['ours'] / times['int8']:.2f}x), {rate_int8:5.1f} GB/s"
    )
    rates = {"gb_s": round(rate, 1), "int8_gb_s": round(rate_int8, 1), "read_gb_s": round(read, 1)}
    return {"rows": rows, "context": context, **rates, **micro(times)}


def chunk(kernels: CpuKernels, new: int, context: int, seconds: float) -> dict[str, object]:
    """The last `new` tokens of one row, over a cache in bf16 and in int8. GFLOP/s are of what the mask leaves."""
    caches, page_table = make_caches(context // PAGE_SIZE, 1)
    int8_caches = make_int8_caches(caches)
    query = torch.randn(new, HEADS, HEAD_DIM).bfloat16()
    start = torch.tensor([0, new], dtype=torch.int32)
    lengths = torch.tensor([context], dtype=torch.int32)

    def ours(layer: int) -> Tensor:
        return kernels.paged_attention(query, caches[layer], start, lengths, page_table, SCALE)

    def int8(layer: int) -> Tensor:
        return kernels.paged_attention(query, int8_caches[layer], start, lengths, page_table, SCALE)

    def plain(layer: int) -> Tensor:
        return grouped(query, *gather(caches[layer], page_table[0]))

    check(int8(0).flatten(1), plain(0))
    check(ours(0).flatten(1), plain(0))
    times = measure({"ours": ours, "int8": int8, "torch": plain}, len(caches), seconds)
    rate = 4 * new * (context - (new - 1) / 2) * HEADS * HEAD_DIM / times["ours"] / 1e9
    print(
        f"chunk  {f'{new} @ {context}':>12}: {times['ours'] * 1e6:8.0f} us a layer, torch {times['torch'] * 1e6:8.0f} "
        f"({times['torch'] / times['ours']:4.1f}x); {rate:5.0f} GFLOP/s; int8 {times['int8'] * 1e6:8.0f} us"
    )
    return {"new": new, "context": context, "gflop_s": round(rate), **micro(times)}


def fused(kernels: CpuKernels, tokens: int, seconds: float) -> list[dict[str, object]]:
    """The element-wise kernels against the torch formulas."""
    pages = tokens // PAGE_SIZE + 1
    cache = make_caches(pages, 1)[0][0]
    int8_cache = make_int8_caches([cache])[0]
    slots = torch.randperm(pages * PAGE_SIZE)[:tokens]
    x, residual = torch.randn(tokens, HIDDEN).bfloat16(), torch.zeros(tokens, HIDDEN).bfloat16()
    weight, head_weight = torch.ones(HIDDEN).bfloat16(), torch.ones(HEAD_DIM).bfloat16()
    gate_up = torch.randn(tokens, 2 * INTERMEDIATE).bfloat16()
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    angles = torch.rand(tokens, HEAD_DIM // 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    cos2, sin2 = torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)

    def rope_store(_: int) -> None:
        query, key, value = qkv.view(tokens, -1, HEAD_DIM).tensor_split((HEADS, HEADS + KV_HEADS), 1)
        query, key = (F.rms_norm(part, (HEAD_DIM,), head_weight, EPS) for part in (query, key))
        query, key = (torch.addcmul(part * cos2, part.roll(HEAD_DIM // 2, -1), sin2) for part in (query, key))
        cache.keys.flatten(0, 1).index_copy_(0, slots, key)
        cache.values.flatten(0, 1).index_copy_(0, slots, value)

    def silu_mul(_: int) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def rope_store_ours(into: LayerCache) -> Callable[[int], object]:
        return lambda _: kernels.qkv_rope_store(qkv, head_weight, head_weight, EPS, cos, sin, into, slots)

    cases: dict[str, Variants] = {
        "add + RMSNorm": {
            "ours": lambda _: kernels.add_rms_norm(x, residual, weight, EPS),
            "torch": lambda _: F.rms_norm(residual.add_(x), (HIDDEN,), weight, EPS),
        },
        "q/k norm, RoPE, store": {
            "ours": rope_store_ours(cache),
            "int8": rope_store_ours(int8_cache),
            "torch": rope_store,
        },
        "SiLU x up": {"ours": lambda _: kernels.silu_mul(gate_up), "torch": silu_mul},
    }
    lines = []
    for name, variants in cases.items():
        times = measure(variants, 1, seconds / 4)
        print(
            f"{name:>21} {tokens:4} tokens: {times['ours'] * 1e6:8.1f} us, torch {times['torch'] * 1e6:8.1f} "
            f"({times['torch'] / times['ours']:4.1f}x)"
            + (f"; int8 {times['int8'] * 1e6:8.1f} us" if "int8" in times else "")
        )
        lines.append({"name": name, "tokens": tokens, **micro(times)})
    return lines


def linears(kernels: CpuKernels, target: str | None, seconds: float) -> list[dict[str, object]]:
    """A layer's linears for x in bf16. FMA: fp32 products from registers alone, measured before and after."""
    elements = sum(outputs * inputs for outputs, inputs in MATRICES)
    layers = KEEP_COLD_BYTES // (2 * elements)
    packed = {}
    for kind in FORMATS:
        form = SlabFormat(kernels, kind)
        packed[kind] = [[form(torch.randn(shape).bfloat16()) for shape in MATRICES] for _ in range(layers)]
    blocks = HugeMemory().empty((layers, elements // 2), torch.float32).fill_(1)
    lines: list[dict[str, object]] = []
    for rows in LINEAR:
        x = {inputs: torch.randn(rows, inputs).bfloat16() for _, inputs in MATRICES}

        def ours(kind: WeightFormat, x: dict[int, Tensor] = x) -> Callable[[int], object]:
            return lambda layer: [
                matrix.multiply(x[inputs]) for matrix, (_, inputs) in zip(packed[kind][layer], MATRICES, strict=True)
            ]

        fma = fma_gflops(target, kernels.threads)
        variants: Variants = {kind.name.lower(): ours(kind) for kind in FORMATS}
        times = measure(variants | {"read": lambda layer: blocks[layer].sum()}, layers, seconds)
        fma = max(fma, fma_gflops(target, kernels.threads))
        rates = {kind: 2 * rows * elements / times[kind] / 1e9 for kind in variants}
        print(
            f"linear {rows:5} rows: bf16 {times['bf16'] * 1e3:7.2f} ms, {rates['bf16']:5.0f} GFLOP/s = "
            f"{rates['bf16'] / fma:4.0%} of FMA, {times['read'] / times['bf16']:4.0%} of reading; "
            + ", ".join(
                f"{kind} {times['bf16'] / times[kind]:.2f}x ({rates[kind] / fma:4.0%})" for kind in ("int8", "int4")
            )
        )
        gflops = {f"{kind}_gflop_s": round(rate) for kind, rate in rates.items()}
        lines.append({"rows": rows, "fma_gflop_s": round(fma), **gflops, **micro(times)})
    return lines


def make_caches(pages: int, rows: int) -> tuple[list[LayerCache], Tensor]:
    """As many layers as KEEP_COLD_BYTES take, two at least, with random values; the rows' pages in random order."""
    layer_bytes = pages * PAGE_SIZE * KV_HEADS * HEAD_DIM * 2 * 2
    layers = min(28, max(2, KEEP_COLD_BYTES // layer_bytes))
    # In the memory and the order of model_worker/kv_pool.py.
    pool = HugeMemory().empty((pages, layers, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM), torch.bfloat16)
    for page in pool:
        page.normal_()
    caches = [LayerCache(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(layers)]
    return caches, torch.randperm(pages, dtype=torch.int32).view(rows, -1)


def make_int8_caches(caches: list[LayerCache]) -> list[LayerCache]:
    """The same in 8 bits, the scales of a page behind its codes, as model_worker/kv_pool.py lays them out."""
    made = []
    for cache in caches:
        parts = []
        for x in (cache.keys, cache.values):
            codes, scales = quantize(x)
            pages = torch.cat((codes.flatten(1), scales.transpose(1, 2).flatten(1).view(torch.int8)), 1)
            parts.append((pages, pages[:, : codes[0].numel()].view(codes.shape), scales.shape))
        (keys, key_codes, shape), (values, value_codes, _) = parts
        scales_shape = (shape[0], shape[2], shape[1])
        key_scales, value_scales = (
            pages.view(torch.float32)[:, -shape[1] * shape[2] :].view(scales_shape) for pages in (keys, values)
        )
        made.append(LayerCache(key_codes, value_codes, key_scales, value_scales))
    return made


def gather(cache: LayerCache, pages: Tensor) -> tuple[Tensor, Tensor]:
    """One request's keys and values, [kv heads, context, head dim]."""
    return (
        cache.keys[pages].flatten(0, 1).transpose(0, 1),
        cache.values[pages].flatten(0, 1).transpose(0, 1),
    )


def folded(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The fastest plain torch for one token: the heads of a group as if they were queries. Returns [1, heads x D]."""
    return F.scaled_dot_product_attention(query.view(KV_HEADS, -1, HEAD_DIM), keys, values).reshape(1, -1)


def grouped(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query: [N, heads, D], the last of the context. Returns [N, heads x D]."""
    new, context = query.shape[0], keys.shape[1]
    group = HEADS // KV_HEADS
    split = query.view(new, KV_HEADS, group, HEAD_DIM).permute(2, 1, 0, 3)
    keys, values = keys.expand(group, -1, -1, -1), values.expand(group, -1, -1, -1)
    if new == context:
        attended = F.scaled_dot_product_attention(split, keys, values, is_causal=True)
    else:
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        attended = F.scaled_dot_product_attention(split, keys, values, attn_mask=mask)
    return attended.permute(2, 1, 0, 3).reshape(new, -1)


def check(ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours.float(), plain.float(), atol=2e-2, rtol=2e-2)


def measure(variants: Variants, layers: int, seconds: float) -> dict[str, float]:
    """Seconds of each variant's best call, of at least three rounds."""
    times = dict.fromkeys(variants, float("inf"))
    end = time.perf_counter() + seconds
    call = 0
    while call < 3 or time.perf_counter() < end:
        for name, run in variants.items():
            start = time.perf_counter()
            run(call % layers)
            times[name] = min(times[name], time.perf_counter() - start)
        call += 1
    return times


def micro(times: dict[str, float]) -> dict[str, float]:
    return {f"{name}_us": round(seconds * 1e6, 1) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
