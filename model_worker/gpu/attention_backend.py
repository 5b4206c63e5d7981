"""Attention over the paged pool through the GPU kernels: one launch for rows that decode, one for chunks of prompts."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.model_worker.drafting import MOST_TOKENS, widths
from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import (
    CHAIN_ROWS,
    CHAIN_SPLITS,
    chain_attention,
    chain_contexts,
    choose_chain_tiles,
)
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (
    LONG_CONTEXT,
    NO_ROW,
    DecodeScratch,
    DecodeTiles,
    NewTokens,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.prefill_attention import (
    FEW_TOKENS,
    SOME_TOKENS,
    PrefillTiles,
    choose_prefill_tiles,
    fixed_prefill_tiles,
    plan_tiles,
    prefill_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import rope_store
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles

IntArray = npt.NDArray[np.int32]
CHUNK_TILES = 4096  # at most, of a step with chunks that is captured
CODES_ROWS = 8  # up to which attention over a cache in 8 bits stores the new tokens: its registers are dear


@dataclass(frozen=True)
class ChunkPlan:
    """The launch for rows of many tokens. tiles: [n, 2], see `plan_tiles`."""

    tiles: Tensor
    cut: PrefillTiles


@dataclass(frozen=True)
class GpuMetadata:
    """order: int32, the rows that decode, the longest first; in a step that is filled up NO_ROW follows, up to as many
    as it has rows. tiles: how their launch is cut. chunks: of the rest, if any.

    chain_tiles: for a step that runs as a chain (layers.py), else None.
    """

    batch: DeviceBatch
    order: Tensor
    tiles: DecodeTiles
    chunks: ChunkPlan | None
    chain_tiles: DecodeTiles | None


@dataclass(frozen=True)
class AttentionPaths:
    """Which ways of attention the layers around it are made for. The plan of the layers (layers.py) settles it once the
    weights are loaded and before the first step; until then there are none but those for any layers.

    chain_rows: up to so many rows, in a step whose rows are one token each over no context longer than LONG_CONTEXT,
    attention is one kernel between two products of a chain (kernels/chain_attention.py), and `GpuMetadata.chain_tiles`
    says so to the layers. 0: in no step. Not of a backend with `fixed_order`.

    narrow: the next product reads its matrix before attention has ended, so steps of some rows take blocks that leave
    it room on the card (NARROW in kernels/decode_attention.py).
    """

    chain_rows: int = 0
    narrow: bool = False


class GpuAttention:
    """A `StepBackend` (model_worker/device_batch.py) for a pool of the model's dtype, or of bytes."""

    def __init__(
        self,
        pool: KVPool,
        device: Device,
        group: int,
        max_rows: int,
        *,
        fp8: bool = False,
        width: int = 1,
        fixed_order: bool = False,
    ) -> None:
        """group: query heads a KV head. max_rows: of a step, padding rows included. fp8: what bytes are, not int8.
        width: tokens of a row that decodes at most, its drafts included. fixed_order: all tokens take the kernel for
        chunks, cut the same, so that no row's bits depend on the others."""
        self.pool = pool
        self.device = device
        self.group = group
        self.pdl = has_dependent_launch(device.torch_device)
        self.caches = [_cache_of(pool, layer, fp8=fp8) for layer in range(pool.num_layers)]
        self.paths = AttentionPaths()
        self.scratch = DecodeScratch(
            pool.kv_heads, group, pool.head_dim, device.torch_device, places=CHAIN_ROWS * CHAIN_SPLITS,
            wide_rows=MOST_TOKENS if width > 1 else 0,
        )  # fmt: skip
        self._order = Fields(device, max_rows, rows=np.int32)
        self._num_ordered = 0
        self._max_rows = max_rows
        self._compiled = False
        self._width = width
        self.fixed_order = fixed_order
        self._chunk_tiles = Fields(device, 2 * CHUNK_TILES, tiles=np.int32)

    def prepare(self, batch: DeviceBatch) -> GpuMetadata:
        if not self._compiled:
            self._compiled = True
            self._compile(batch)
        decode_rows = batch.num_decode_rows
        chain = self._runs_as_chain(batch)
        places, longest = decode_rows, batch.max_context
        if batch.fills_bucket:  # for so many rows or fewer, of any length
            places, longest = batch.num_rows, LONG_CONTEXT + 1
        self._sort(batch.host_context_lengths[:decode_rows], places)
        wide, narrow = batch.width > 1, self.paths.narrow
        tiles = choose_tiles(places, self.pool.kv_heads, self.pool.data.dtype, longest, wide=wide, narrow=narrow)
        chunks = None if batch.decodes_only and not self.fixed_order else self._plan_chunks(batch)
        order = self._order.device["rows"][:places]
        chain_tiles = choose_chain_tiles(batch.max_context, self.group) if chain else None
        return GpuMetadata(batch, order, tiles, chunks, chain_tiles)

    def graph_key(self, batch: DeviceBatch) -> Hashable | None:
        if self.fixed_order and batch.decodes_only:
            return "any"
        if not batch.decodes_only:
            return batch.num_rows if self._num_tiles(batch, self._cut(batch.num_tokens)) <= CHUNK_TILES else None
        if self._runs_as_chain(batch):
            return choose_chain_tiles(batch.max_context, self.group)
        return batch.max_context > LONG_CONTEXT

    def graph_contexts(self) -> Sequence[int]:
        if self.fixed_order:
            return (1,)
        return (*chain_contexts(self.group), LONG_CONTEXT + 1) if self.paths.chain_rows else (1, LONG_CONTEXT + 1)

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        query_norm: RMSNorm,
        key_norm: RMSNorm,
        angles: RopeAngles,
        metadata: GpuMetadata,
    ) -> Tensor:
        cache, batch = self.caches[layer], metadata.batch
        norms = query_norm.weight.tensor, key_norm.weight.tensor, (query_norm.eps, key_norm.eps)
        query = qkv.new_empty((qkv.shape[0], self.group * self.pool.kv_heads * self.pool.head_dim))
        if metadata.chain_tiles is not None and not cache.in_codes:  # for which there is none
            chain_attention(
                qkv, *norms, angles.cos, angles.sin, batch.slot_mapping, cache.keys, cache.values, batch.page_table,
                batch.context_lengths, self.scratch, query, tiles=metadata.chain_tiles, pdl=self.pdl,
            )  # fmt: skip
            return query
        rows = batch.page_table, batch.context_lengths, metadata.order, self.scratch
        if metadata.chunks is None and batch.width == 1 and not (cache.in_codes and len(qkv) > CODES_ROWS):
            new = NewTokens(*norms, angles.cos, angles.sin, batch.slot_mapping)
            decode_attention(qkv, cache, *rows, query, tiles=metadata.tiles, pdl=self.pdl, new=new)
            return query
        keep = cache.in_codes and metadata.chunks is not None and not self.fixed_order
        rope_store(qkv, *norms, angles.cos, angles.sin, batch.slot_mapping, cache, query, pdl=self.pdl, keep=keep)
        # Unless it is read once more, qkv is spent.
        attended = torch.empty_like(query) if keep else qkv.view(-1)[: query.numel()].view(query.shape)
        decoding = len(metadata.order) * batch.width
        if decoding and not self.fixed_order:
            positions = batch.positions if batch.width > 1 else None
            decode_attention(
                query[:decoding], cache, *rows, attended[:decoding], tiles=metadata.tiles, pdl=self.pdl,
                positions=positions,
            )  # fmt: skip
        if metadata.chunks is not None:
            prefill_attention(
                query,
                cache,
                batch.page_table,
                batch.context_lengths,
                batch.query_start,
                metadata.chunks.tiles,
                metadata.chunks.cut,
                attended,
                pdl=self.pdl,
                positions=batch.positions if self.fixed_order else None,
                fresh=qkv if keep else None,
            )
        return attended

    def _runs_as_chain(self, batch: DeviceBatch) -> bool:
        most = self.paths.chain_rows
        few = batch.decodes_only and batch.num_rows <= most and batch.width == 1
        return most > 0 and few and batch.max_context <= LONG_CONTEXT

    def _compile(self, batch: DeviceBatch) -> None:
        """Launch every cut that there is over a row without context: the first use of one takes a second or two, which
        must not be in the middle of other requests' streams."""
        zeros = torch.zeros(128, dtype=torch.int32, device=self.device.torch_device)
        width = self.group * self.pool.kv_heads * self.pool.head_dim
        query, output = torch.zeros((2, 1, width), dtype=self.pool.dtype, device=self.device.torch_device)
        half, wide = query[:, : self.pool.head_dim // 2], width + 2 * self.pool.kv_heads * self.pool.head_dim
        new = NewTokens(query, query, (1.0, 1.0), half, half, zeros[:2].view(torch.int64))
        qkv = query.new_zeros((1, wide))
        cache, table, dtype = self.caches[0], batch.page_table[:1], self.pool.data.dtype
        rows = table, zeros, zeros[:1], self.scratch

        def decode_tiles(*, wide: bool) -> set[DecodeTiles]:
            return {
                choose_tiles(rows, self.pool.kv_heads, dtype, context, wide=wide, narrow=self.paths.narrow)
                for rows in range(1, self._max_rows + 1)
                for context in (1, LONG_CONTEXT + 1)
                if not self.fixed_order
            }

        for tiles in decode_tiles(wide=False):
            decode_attention(query, cache, *rows, output, tiles=tiles, pdl=self.pdl)
            decode_attention(qkv, cache, *rows, output, tiles=tiles, pdl=self.pdl, new=new)
        for tiles in decode_tiles(wide=True) if self._width > 1 else ():
            for width in widths(self._width - 1):
                several = query.expand(width, -1).contiguous()
                decode_attention(
                    several, cache, *rows, torch.empty_like(several), tiles=tiles, pdl=self.pdl, positions=zeros
                )  # fmt: skip
        positions = zeros if self.fixed_order else None
        fresh = qkv if cache.in_codes and not self.fixed_order else None
        for cut in {self._cut(1), self._cut(FEW_TOKENS + 1), self._cut(SOME_TOKENS + 1)}:
            rest = table, zeros, zeros, zeros[:2].view(1, 2), cut, output
            prefill_attention(query, cache, *rest, pdl=self.pdl, positions=positions, fresh=fresh)

    def _sort(self, lengths: IntArray, places: int) -> None:
        """Bring the order to the device, NO_ROW behind it up to `places`; unless the one that is there is as good:
        lengths grow by one a step."""
        known = self._order.host["rows"][: len(lengths)]
        whole = places == len(lengths)
        if whole and self._num_ordered == len(lengths) and (np.diff(lengths[known]) <= 0).all():
            return
        known[:] = np.argsort(-lengths, kind="stable")
        self._order.host["rows"][len(lengths) : places] = NO_ROW
        self._num_ordered = len(lengths) if whole else 0
        self._order.send(places)

    def _cut(self, tokens: int) -> PrefillTiles:
        if self.fixed_order:
            return fixed_prefill_tiles(self.group, self.pool.data.dtype)
        return choose_prefill_tiles(tokens, self.group, self.pool.data.dtype)

    def _num_tiles(self, batch: DeviceBatch, cut: PrefillTiles) -> int:
        """The most that so many tokens in so many rows may have: each row has one that is not full, at most."""
        return batch.num_tokens // (cut.rows // self.group) + min(batch.num_rows, batch.num_tokens)

    def _plan_chunks(self, batch: DeviceBatch) -> ChunkPlan:
        cut = self._cut(batch.num_tokens)
        first = 0 if self.fixed_order else batch.num_decode_rows
        rows = np.arange(first, batch.num_rows, dtype=np.int32)
        tiles = plan_tiles(batch.host_query_start, rows, cut.rows // self.group)
        count = self._num_tiles(batch, cut)
        if not (batch.fills_bucket or batch.decodes_only) or count > CHUNK_TILES:
            return ChunkPlan(self.device.tensor(tiles), cut)
        host = self._chunk_tiles.host["tiles"].reshape(-1, 2)
        host[: len(tiles)] = tiles
        host[len(tiles) : count] = NO_ROW
        self._chunk_tiles.send(2 * count)
        return ChunkPlan(self._chunk_tiles.device["tiles"][: 2 * count].view(-1, 2), cut)


def _cache_of(pool: KVPool, layer: int, *, fp8: bool) -> LayerCache:
    keys, values = pool.keys(layer), pool.values(layer)
    key_scales, value_scales = pool.key_scales(layer), pool.value_scales(layer)
    if key_scales is None or value_scales is None:
        return LayerCache(keys, values)
    return LayerCache.of_codes(keys, values, key_scales, value_scales, integers=not fp8)
