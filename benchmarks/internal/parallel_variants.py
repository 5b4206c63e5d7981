"""Other ways to run the dense layers of several GPUs, by the names that parallel_steps.py takes as --variants.

cublas: without the products of kernels/rank_product.py and cluster_product.py; triton: without the latter, as all that
have other cuts or N lines. unsent: sums send by themselves. alone: sums are over nobody (wrong, to see what the other
ranks cost). nochain: few rows run as many do. eN: N lines are asked for before the wait. aK.W.S.P: other tiles of
attention (keys, warps, stages, splits). Another cut for 33 to 64 rows of g gate and up, q qkv, o attention's output or
l what has long inputs: gc by cuBLAS, g:128.64.8.5.0.4.100.132 by outputs, inputs, warps, stages, matrix first, lines
early, span, programs at once. qc+oc is two of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from vibe_sgl_lite.model_worker.gpu import attention_backend, collectives, rank_products
from vibe_sgl_lite.model_worker.gpu.kernels import decode_attention
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import DecodeTiles
from vibe_sgl_lite.model_worker.gpu.kernels.elementwise import add_rms_norm
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import ProductCut
from vibe_sgl_lite.model_worker.gpu.rank_products import MOST_ROWS


def vary(variant: str) -> ExitStack:
    """For as long as it lasts, all that a variant changes."""
    stack = ExitStack()
    for part in variant.partition("@")[0].split("+"):
        for change in changes(part):
            stack.enter_context(change)
    return stack


def changes(part: str) -> list[Any]:
    """What one name of a variant changes, as patches."""
    choose = rank_products.choose_cut
    without_clusters = patch.object(rank_products, "choose_clusters", lambda *_, **__: None)
    if part in ("ours", "filtered"):
        return []
    if part == "cublas":
        return [without_clusters, patch.object(rank_products, "choose_cut", lambda *_, **__: None)]
    if part == "triton":
        return [without_clusters]
    if part == "unsent":
        return [patch("vibe_sgl_lite.model_worker.gpu.kernels.all_reduce.Outbox.takes", lambda *_: False)]
    if part == "alone":
        return [patch.object(collectives.PeerMemory, "all_reduce_add_norm", add_norm_alone)]
    if part == "nochain":
        return [patch.object(attention_backend.GpuAttention, "_runs_as_chain", lambda *_: False)]
    if part[0] == "a":
        keys, warps, stages, splits_of_all = (int(number) for number in part[1:].split("."))
        tiles = DecodeTiles(keys, warps, stages, splits_of_all)
        modules = decode_attention, attention_backend
        return [patch.object(module, "choose_tiles", lambda *_, **__: tiles) for module in modules]
    if part[0] == "e":
        lines = int(part[1:])

        def earlier(*shape: Any, **options: Any) -> Any:
            cut = choose(*shape, **options)
            return cut and replace(cut, early=min(lines, shape[2] // cut.splits // 64))

        return [without_clusters, patch.object(rank_products, "choose_cut", earlier)]

    def cut_so(rows: int, outputs: int, inputs: int, dtype: Any, *, silu: bool) -> Any:
        kind = "g" if silu else "l" if inputs >= rank_products.LONG_INPUTS else "q" if inputs >= outputs else "o"
        if part[0] != kind or not 32 < rows <= MOST_ROWS or dtype == torch.float32:
            return choose(rows, outputs, inputs, dtype, silu=silu)
        if part[1:] == "c":
            return None
        width, depth, warps, stages, first, early, span, places = (int(number) for number in part[2:].split("."))
        cut = ProductCut(64, width, depth, 1, warps, stages, bool(first), early=early, span=span)
        splits = 1 if silu else max(1, min(places // (outputs // cut.width), inputs // cut.inputs // 2))
        return replace(cut, splits=splits)

    return [without_clusters, patch.object(rank_products, "choose_cut", cut_so)]


def add_norm_alone(
    peers: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, sent: bool
) -> None:
    """`all_reduce_add_norm` over this rank alone. What was sent stays, until the next call writes there again."""
    add_rms_norm(x, residual, weight, eps, x, pdl=True)
