"""Attention over the paged pool through the GPU kernels: one launch for rows that decode, one for chunks of prompts."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import (
    CHAIN_CONTEXTS,
    CHAIN_ROWS,
    CHAIN_SPLITS,
    choose_chain_tiles,
)
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (
    LONG_CONTEXT,
    DecodeScratch,
    DecodeTiles,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.prefill_attention import (
    SHORT_CONTEXT,
    PrefillTiles,
    choose_prefill_tiles,
    plan_tiles,
    prefill_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import rope_store
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.step_input import PROMPT_ROWS
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles

IntArray = npt.NDArray[np.int32]
PROMPT_TILES = 4096  # of a prompt that comes alone and is filled up


@dataclass(frozen=True)
class ChunkPlan:
    """The launch for rows of many tokens. tiles: [n, 2], see `plan_tiles`."""

    tiles: Tensor
    cut: PrefillTiles


@dataclass(frozen=True)
class GpuMetadata:
    """order: [decode rows] int32, the longest first. tiles: how their launch is cut. chunks: of the rest, if any.

    chain_tiles: for a step that runs as a chain (layers.py), else None.
    """

    batch: DeviceBatch
    order: Tensor
    tiles: DecodeTiles
    chunks: ChunkPlan | None
    chain_tiles: DecodeTiles | None


class GpuAttention:
    """A `StepBackend` (model_worker/device_batch.py) for a pool of the model's dtype."""

    def __init__(self, pool: KVPool, device: Device, group: int, max_rows: int) -> None:
        """group: query heads a KV head. max_rows: of a step, padding rows included."""
        self.pool = pool
        self.device = device
        self.group = group
        self.pdl = has_dependent_launch(device.torch_device)
        self.caches = [(pool.keys(layer), pool.values(layer)) for layer in range(pool.num_layers)]
        self.has_chain = False  # set by what plans the layers
        self.scratch = DecodeScratch(
            pool.kv_heads, group, pool.head_dim, device.torch_device, places=CHAIN_ROWS * CHAIN_SPLITS
        )
        self._order = Fields(device, max_rows, rows=np.int32)
        self._num_ordered = 0
        self._max_rows = max_rows
        self._compiled = False
        self._prompt_tiles = Fields(device, 2 * PROMPT_TILES, tiles=np.int32)

    def prepare(self, batch: DeviceBatch) -> GpuMetadata:
        if not self._compiled:
            self._compiled = True
            self._compile(batch)
        decode_rows = batch.num_decode_rows
        chain = self._runs_as_chain(batch)
        self._sort(batch.host_context_lengths[:decode_rows])
        tiles = choose_tiles(decode_rows, self.pool.kv_heads, self.pool.data.dtype, batch.max_context)
        chunks = None if batch.decodes_only else self._plan_chunks(batch)
        order = self._order.device["rows"][:decode_rows]
        return GpuMetadata(batch, order, tiles, chunks, choose_chain_tiles(batch.max_context) if chain else None)

    def graph_key(self, batch: DeviceBatch) -> Hashable | None:
        if not batch.decodes_only:
            fits = self._fills_bucket(batch) and batch.max_context <= SHORT_CONTEXT
            return self._cut(batch.max_context) if fits else None
        return choose_chain_tiles(batch.max_context) if self._runs_as_chain(batch) else batch.max_context > LONG_CONTEXT

    def graph_contexts(self) -> Sequence[int]:
        return (*CHAIN_CONTEXTS, LONG_CONTEXT + 1) if self.has_chain else (1, LONG_CONTEXT + 1)

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        query_norm: RMSNorm,
        key_norm: RMSNorm,
        angles: RopeAngles,
        metadata: GpuMetadata,
    ) -> Tensor:
        keys, values = self.caches[layer]
        batch = metadata.batch
        query = qkv.new_empty((qkv.shape[0], self.group * self.pool.kv_heads * self.pool.head_dim))
        rope_store(
            qkv,
            query_norm.weight.tensor,
            key_norm.weight.tensor,
            (query_norm.eps, key_norm.eps),
            angles.cos,
            angles.sin,
            batch.slot_mapping,
            keys,
            values,
            query,
            pdl=self.pdl,
        )
        attended = qkv.view(-1)[: query.numel()].view(query.shape)  # qkv is spent
        decode_rows = batch.num_decode_rows
        if decode_rows:
            decode_attention(
                query[:decode_rows],
                keys,
                values,
                batch.page_table,
                batch.context_lengths,
                metadata.order,
                self.scratch,
                attended[:decode_rows],
                tiles=metadata.tiles,
                pdl=self.pdl,
            )
        if metadata.chunks is not None:
            prefill_attention(
                query,
                keys,
                values,
                batch.page_table,
                batch.context_lengths,
                batch.query_start,
                metadata.chunks.tiles,
                metadata.chunks.cut,
                attended,
                pdl=self.pdl,
            )
        return attended

    def _runs_as_chain(self, batch: DeviceBatch) -> bool:
        few = batch.decodes_only and batch.num_rows <= CHAIN_ROWS
        return self.has_chain and few and batch.max_context <= LONG_CONTEXT

    def _compile(self, batch: DeviceBatch) -> None:
        """Launch every cut that there is over a row without context: the first use of one takes a second or two, which
        must not be in the middle of other requests' streams."""
        zeros = torch.zeros(16, dtype=torch.int32, device=self.device.torch_device)
        width = self.group * self.pool.kv_heads * self.pool.head_dim
        query, output = torch.zeros((2, 1, width), dtype=self.pool.data.dtype, device=self.device.torch_device)
        cache, table, dtype = self.caches[0], batch.page_table[:1], self.pool.data.dtype
        for tiles in {
            choose_tiles(rows, self.pool.kv_heads, dtype, context)
            for rows in range(1, self._max_rows + 1)
            for context in (1, LONG_CONTEXT + 1)
        }:
            decode_attention(query, *cache, table, zeros, zeros[:1], self.scratch, output, tiles=tiles, pdl=self.pdl)
        for cut in {self._cut(1), self._cut(SHORT_CONTEXT + 1)}:
            no_tokens = zeros[:2].view(1, 2)
            prefill_attention(query, *cache, table, zeros, zeros, no_tokens, cut, output, pdl=self.pdl)

    def _sort(self, lengths: IntArray) -> None:
        """Bring the order to the device, unless the one that is there is as good: lengths grow by one a step."""
        known = self._order.host["rows"][: len(lengths)]
        if self._num_ordered == len(lengths) and (np.diff(lengths[known]) <= 0).all():
            return
        known[:] = np.argsort(-lengths, kind="stable")
        self._num_ordered = len(lengths)
        self._order.send(len(lengths))

    def _fills_bucket(self, batch: DeviceBatch) -> bool:
        """Whether it is one prompt, filled up: then the tiles lie in a place, and in a number, that stay."""
        lengths = batch.host_context_lengths
        return batch.num_decode_rows == 0 and len(lengths) == PROMPT_ROWS and not lengths[1:].any()

    def _cut(self, longest: int) -> PrefillTiles:
        return choose_prefill_tiles(longest, self.group, self.pool.data.dtype)

    def _plan_chunks(self, batch: DeviceBatch) -> ChunkPlan:
        first = batch.num_decode_rows
        cut = self._cut(int(batch.host_context_lengths[first:].max()))
        tokens = cut.rows // self.group
        if self._fills_bucket(batch):
            tiles = plan_tiles(batch.host_query_start, np.zeros(1, dtype=np.int32), tokens)
            count = -(-batch.num_tokens // tokens)
            if count <= PROMPT_TILES:
                host = self._prompt_tiles.host["tiles"].reshape(-1, 2)
                host[: len(tiles)] = tiles
                host[len(tiles) : count] = PROMPT_ROWS - 1, 0  # of the row without tokens
                self._prompt_tiles.send(2 * count)
                return ChunkPlan(self._prompt_tiles.device["tiles"][: 2 * count].view(-1, 2), cut)
        rows = np.arange(first, batch.num_rows, dtype=np.int32)
        tiles = plan_tiles(batch.host_query_start, rows, tokens)
        return ChunkPlan(self.device.tensor(tiles), cut)
