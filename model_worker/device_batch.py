"""The device seam: what a step looks like on the device, and what a backend for a device has to do with it.

A step, as `ModelRunner` drives it (R rows, one a request; T tokens of all rows, one row after another):

    batch = slots.prepare()                    tables on the host -> DeviceBatch; few copies, nothing read back
    metadata = backend.prepare(batch)          once a step, outside the layers and outside any graph
    model.forward(..., metadata)               backend.forward for every layer; then head and sampler
    graphs.run(key, work)                      where there is a graph of the line above: replay that

Order of rows: the scheduler sends those that decode first, then chunks of prompts. The first `num_decode_rows` rows
have exactly one token each (but see `DeviceBatch.width`), so row r has token r there; the rest have any number, one
too. A backend with kernels of its own for the two runs them as two launches over the two parts.

Padding: where a device wants few shapes (`StepGraphs`), a step of decode rows alone is filled up with rows of context
length 0. Their token is 0, their position 0, their key and value go to the pool's padding page, as all the
entries of their page table do; whatever attention gives for them is never read, but must be finite. Entries of a page
table behind a row's context are the padding page's or stale: never to be read for anybody's context. A step with chunks
is filled up with rows of context length 0 too, but these have no token: the tokens that fill it come last, belong to no
row, and get nothing from attention.

Addresses: on devices that work behind the host's back (`Device.synchronous` False), every tensor of a `DeviceBatch` is
the beginning of a buffer that lives as long as the runner. What a captured graph has read once it reads again, of the
next batch. A backend keeps the tensors of its metadata the same way: `prepare` fills them in place, and returns equal
metadata, addresses and shapes, for all batches that have the same `graph_key`. A batch is valid until the next one is
prepared.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vibe_sgl_lite.qwen3.attention_backend import AttentionBackend

IntArray = npt.NDArray[np.int32]
ChunkBucket = tuple[int, int]  # tokens and rows of a step with chunks that is filled up
Result = TypeVar("Result")


@dataclass(frozen=True)
class DeviceBatch:
    """One step. Tensors lie on the model's device; R and T count padding rows.

    token_ids, positions: [T] int32. slot_mapping: [T] int64, where each token's key and value go in every layer's part
        of the pool: page x page_size + place in the page.
    query_start: [R + 1] int32; row r has tokens query_start[r] .. query_start[r + 1].
    context_lengths: [R] int32; tokens of row r cached when this step is done, its new ones included; 0: padding.
    page_table: [R, pages] int32; position p of row r is in page page_table[r, p // page_size]. pages: on a CPU as many
        as the longest context of the step needs, on other devices always those of the longest possible one.
    num_decode_rows: how many of the first rows have one token each.
    host_query_start, host_context_lengths: the same numbers on the host, for planning; max_context: the longest.
    fills_bucket: it is a step with chunks, filled up to one of `StepGraphs.chunk_buckets`.
    width: tokens of each row that decodes: 1, or more in a step with drafts (drafting.py), whose rows all decode.
        A row's tokens are then followed by some of position 0 that are nobody's, and the host's lengths are the most
        that they may be.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lengths: Tensor
    page_table: Tensor
    num_decode_rows: int
    host_query_start: IntArray
    host_context_lengths: IntArray
    max_context: int
    fills_bucket: bool = False
    width: int = 1

    @property
    def num_rows(self) -> int:
        return len(self.host_context_lengths)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def decodes_only(self) -> bool:
        return self.num_decode_rows == self.num_rows


class StepBackend(AttentionBackend, Protocol):
    """What the runner asks of an attention backend, besides what the model does (qwen3/attention_backend.py).

    One is made over a `KVPool` (`Compute.attention`). Its kernels see a layer's cache as `pool.keys(layer)` and
    `pool.values(layer)`, [page, token, kv head, head dim] with any stride between pages: whether a page holds all
    layers, or a layer all pages, is the `KVLayout` that the backend asks for (`Compute.kv_layout`). One that inherits
    has no graphs.
    """

    def prepare(self, batch: DeviceBatch) -> Any:
        """The metadata that `forward` gets in every layer of this step. May enqueue work; reads nothing back."""
        ...

    def graph_key(self, batch: DeviceBatch) -> Hashable | None:
        """Under what key the work on this batch may be captured and replayed, beside its number of rows; None: never.

        A backend that launches differently for long contexts gives them other keys: kernels, grids and splits are baked
        into a graph, and may follow from the key alone, and the numbers of rows and tokens.
        """
        return None

    def graph_contexts(self) -> Sequence[int]:
        """Values of `max_context`, one for every key of steps of decode rows alone: with them, the runner makes the
        batches to capture. Steps with chunks have one key at any."""
        return ()


class StepGraphs(Protocol):
    """Captured graphs of whole steps, on devices that have such. The runner decides what is one piece of work.

    row_buckets: numbers of rows, ascending, to which the runner pads steps of decode rows. chunk_buckets: numbers of
        tokens and of rows, ascending, to which it fills up steps with chunks.
    """

    row_buckets: Sequence[int]
    chunk_buckets: Sequence[ChunkBucket]

    def run(self, key: Hashable, work: Callable[[], Result]) -> Result:
        """Replay the graph captured under `key` and return what `work` returned at its capture: the same tensors, new
        values. Without one, run `work` as it is; or capture it, in `capturing`, after running it once.

        work: enqueues operations alone, over tensors of fixed addresses, whose values alone differ from call to call.
        Its result is valid until the next replay of any graph.
        """
        ...

    def capturing(self) -> AbstractContextManager[None]:
        """While it is open, keys not seen yet are captured. The runner warms up in it, the largest batches first."""
        ...
