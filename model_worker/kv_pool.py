"""The paged KV cache of one rank: one tensor, and one extra page for padding (memory_plan.py says how many pages).

The scheduler hands out pages 0 .. num_pages - 1 and never touches the tensor. Page `num_pages` is the padding page:
whatever is written there is never read as anyone's context. Elements are of the model's dtype, or int8 with scales
(kv_int8.py), or on a GPU fp8 in the same bytes (gpu/kernels/cache.py).
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.commit_ahead import CommitAhead
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.kv_int8 import HEAD_DIM_MULTIPLE, SCALE_BYTES
from vibe_sgl_lite.runtime.settings.machine import available_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

TOKENS_AHEAD = 1024  # so much room is made ready behind what is used: two chunks of a CPU
# What a rank on CPU makes ready before it takes requests: enough for a handful of conversations.
READY_TOKENS = 8192
READY_LIMIT_BYTES = 1 << 30  # of all ranks of a machine
READY_SHARE = 1 / 32  # of the memory that is free: a large model's cache takes what little it leaves only as it is used
READY_SECONDS = 0.5  # nobody waits longer for it; what is left is committed as it is used
PIECE_BYTES = 32 << 20


class KVLayout(Enum):
    """Which attention backends choose from. PAGES: all layers of a page lie together. LAYERS: all pages of a layer's
    keys lie together, and all of its values: a page is then a few kilobytes, and offsets within a layer are small; in 8
    bits a page's tokens lie together for each KV head."""

    PAGES = auto()
    LAYERS = auto()


class KVPool:
    """`data`: [page, layer, K/V, token, kv head, head dim], this rank's KV heads; in int8 [page, layer, K/V, bytes]. It
    is so in any layout: a view where layers come first in memory.

    On CPU the memory is only reserved here; `make_ready` commits the first of it, and the rest is committed as it is
    used, on Linux in huge pages (of 2 MiB on x86) where it has them: attention reads all over the pool, and spends less
    on translating addresses. All that belongs to a page
    lies together, so that memory is needed a little at a time: with the layers apart, all of them would come to the end
    of their huge pages in the same step.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp_size: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool = False,
        layout: KVLayout = KVLayout.PAGES,
    ) -> None:
        """dtype: the model's, which is also that of the elements unless `int8`."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.padding_page = num_pages
        self.num_layers = config.num_hidden_layers
        self.kv_heads = config.local_kv_heads(tp_size)
        self.head_dim = config.head_dim
        self.int8 = int8
        self.dtype = dtype
        page_shape: tuple[int, ...] = (page_size, self.kv_heads, self.head_dim)
        if int8:
            assert self.head_dim % HEAD_DIM_MULTIPLE == 0
            dtype, page_shape = torch.int8, (page_size * self.kv_heads * (self.head_dim + SCALE_BYTES),)
        shape = (num_pages + 1, self.num_layers, 2, *page_shape)
        self._commit: CommitAhead | None = None
        self._by_layer = layout is KVLayout.LAYERS
        if layout is KVLayout.LAYERS:
            by_layer = torch.empty((self.num_layers, 2, num_pages + 1, *page_shape), dtype=dtype, device=device)
            self.data = by_layer.movedim(2, 0)
        elif device.type == "cpu" and sys.platform == "linux":
            self.data = HugeMemory().empty(shape, dtype)
            self._commit = CommitAhead(self.data, -(-TOKENS_AHEAD // page_size), torch.get_num_threads())
        else:
            self.data = torch.empty(shape, dtype=dtype, device=device)

    def make_ready(self, ranks_on_machine: int, heartbeat: Callable[[], None]) -> None:
        """Commit the memory of the first READY_TOKENS on CPU, at most READY_LIMIT_BYTES and READY_SHARE; what is in it
        becomes zero.

        On all of torch's threads: 0.1 s a GB, or over a second where a virtual machine's host has to find it first, of
        which it then takes only READY_SECONDS, and leaves the rest to idle moments.
        `heartbeat` is called while it goes on.
        """
        if self.data.device.type != "cpu" or not self.data.is_contiguous():
            return
        size = min(-(-READY_TOKENS // self.page_size) * self.data[0].nbytes, self.data.nbytes)
        size = min(size, int(min(READY_LIMIT_BYTES, available_memory().value * READY_SHARE)) // ranks_on_machine)
        memory = self.data.view(-1).view(torch.uint8)[:size]
        deadline = time.monotonic() + READY_SECONDS
        for begin in range(0, size, PIECE_BYTES):
            memory[begin : begin + PIECE_BYTES].zero_()
            heartbeat()
            if time.monotonic() > deadline:
                break
        if self._commit is not None:
            self._commit.at_least(size // self.page_bytes)

    def will_use(self, page: int) -> None:
        """A step is about to write, to this page at the highest: returns when there is memory for it."""
        if self._commit is not None:
            self._commit.reached(page)

    def idle(self) -> None:
        """Until the next step, memory for what may come behind what is used is made ready."""
        if self._commit is not None:
            self._commit.idle()

    def will_load(self, pages: int) -> None:
        """So many pages may be filled at once: memory for them is made ready while no steps run."""
        if self._commit is not None:
            self._commit.at_least(pages + -(-TOKENS_AHEAD // self.page_size))

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Meanwhile no memory is made ready: who waits for pages wants all cores."""
        if self._commit is not None:
            self._commit.rest(True)
        try:
            yield
        finally:
            if self._commit is not None:
                self._commit.rest(False)

    @property
    def page_bytes(self) -> int:
        return self.data[0].numel() * self.data.element_size()

    @property
    def format(self) -> str:
        """Of a page's bytes, in words."""
        order = " by heads" if self.int8 and self._by_layer else ""
        return f"{self.data.dtype} {tuple(self.data.shape[1:])}{order}"

    def copy_of(self, pages: Sequence[int]) -> Tensor:
        """uint8 [page, bytes], on the pool's device: what these pages hold when all that is enqueued has run."""
        copy = self.data.index_select(0, self._index(pages))
        return copy.view(len(pages), -1).view(torch.uint8)

    def host_memory(self, pages: Sequence[int]) -> Sequence[Tensor]:
        """uint8 [bytes] a page, on the host, to be filled: where a CPU's pool has them, else new memory."""
        if self.data.device.type == "cpu" and self.data.is_contiguous():
            return [self.data[page].view(-1).view(torch.uint8) for page in pages]
        pinned = self.data.device.type == "cuda"
        return [*torch.empty((len(pages), self.page_bytes), dtype=torch.uint8, pin_memory=pinned)]

    def mark(self) -> torch.cuda.Event | None:
        """What is enqueued so far, for `filled`."""
        return torch.cuda.current_stream(self.data.device).record_event() if self.data.is_cuda else None

    def filled(self, pages: Sequence[int], memory: Sequence[Tensor], after: torch.cuda.Event | None) -> None:
        """`host_memory` is filled: the pages hold it when this returns. From any thread; steps go on meanwhile, but for
        those up to `after`, which may still read what the pages held."""
        if self.data.device.type == "cpu" and self.data.is_contiguous():
            return
        stream = torch.cuda.Stream(self.data.device) if self.data.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            if stream is not None and after is not None:
                stream.wait_event(after)
            self.fill(pages, memory)
        if stream is not None:
            stream.synchronize()

    def fill(self, pages: Sequence[int], memory: Sequence[Tensor]) -> None:
        """Enqueue copies, uint8 [bytes] a page in pinned memory of the host, into pages."""
        rows = torch.empty((len(pages), self.page_bytes), dtype=torch.uint8, device=self.data.device)
        for row, host in zip(rows, memory, strict=True):
            row.copy_(host, non_blocking=True)
        shape = (len(pages), *self.data.shape[1:])
        self.data.index_copy_(0, self._index(pages), rows.view(self.data.dtype).view(shape))

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64).to(self.data.device, non_blocking=True)

    def keys(self, layer: int) -> Tensor:
        """[page, token, kv head, head dim], a view; codes in int8."""
        return self._elements(self.data[:, layer, 0])

    def values(self, layer: int) -> Tensor:
        """[page, token, kv head, head dim], a view; codes in int8."""
        return self._elements(self.data[:, layer, 1])

    def key_scales(self, layer: int) -> Tensor | None:
        """[page, kv head, token] fp32, a view; None where elements are of the model's dtype."""
        return self._scales(self.data[:, layer, 0])

    def value_scales(self, layer: int) -> Tensor | None:
        """[page, kv head, token] fp32, a view; None where elements are of the model's dtype."""
        return self._scales(self.data[:, layer, 1])

    def _elements(self, pages: Tensor) -> Tensor:
        if not self.int8:
            return pages
        codes = pages[:, : self.page_size * self.kv_heads * self.head_dim]
        if self._by_layer:
            return codes.view(-1, self.kv_heads, self.page_size, self.head_dim).transpose(1, 2)
        return codes.view(-1, self.page_size, self.kv_heads, self.head_dim)

    def _scales(self, pages: Tensor) -> Tensor | None:
        if not self.int8:
            return None
        scales = pages.view(torch.float32)[:, -self.page_size * self.kv_heads :]
        return scales.view(-1, self.kv_heads, self.page_size)


def bytes_per_token(config: ModelConfig, tp_size: int, dtype: torch.dtype, *, int8: bool) -> int:
    """What one token takes on one rank, keys and values of all layers together."""
    if int8:
        return config.kv_bytes_per_token(tp_size, torch.int8.itemsize, SCALE_BYTES)
    return config.kv_bytes_per_token(tp_size, dtype.itemsize)
