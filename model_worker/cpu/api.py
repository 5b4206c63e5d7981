"""The CPU kernels on torch tensors: paged attention, KV store, RMSNorm, q/k norm + rotary embedding, SiLU x up, argmax.

bf16 and fp32. Values are fp32 inside and rounded where transformers' Qwen3 rounds them. The methods check shapes and
dtypes with assertions, allocate nothing but their result, and run on torch's own OpenMP threads.
Legend: T tokens, R rows (requests), Hq query heads, Hk KV heads, D head dim, N any size.
"""

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.build import COMPILERS, BuildError, build, prebuilt
from vibe_sgl_lite.model_worker.cpu.library import function_name, open_library, structures
from vibe_sgl_lite.model_worker.cpu.linear import SlabWeights, WeightFormat
from vibe_sgl_lite.model_worker.cpu.openmp import parallel_function
from vibe_sgl_lite.model_worker.cpu.targets import Target, choose_target

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as native/kernels.cpp numbers them


def load(
    cache_dir: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    threads: int | None = None,
    target: str | None = None,
    flags: Sequence[str] = (),
    *,
    fixed_order: bool = False,
) -> "CpuKernels | None":
    """Load the kernels that the installation brings, or else build them (at first use); None, with the reason logged,
    where neither is possible.

    threads: at most this many run a kernel; None: torch.get_num_threads() as it is now. target, flags: a name from
    targets.py, and more flags for the compiler. fixed_order: see `CpuKernels`.

    Raises ConfigError for a target that this CPU cannot run.
    """
    chosen = choose_target(target)
    library = None if flags else _open_prebuilt(chosen)
    try:
        library = library or open_library(build(cache_dir, compilers, chosen, flags))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels are not available, plain torch is used: %s", error)
        return None
    return CpuKernels(library, torch.get_num_threads() if threads is None else threads, fixed_order=fixed_order)


def _open_prebuilt(target: Target) -> ctypes.CDLL | None:
    path = prebuilt(target)
    if path is None:
        return None
    try:
        return open_library(path)
    except OSError as error:
        logger.warning("the CPU kernels of this installation cannot be used, so they are compiled: %s", error)
        return None


class LayerCache:
    """One layer's keys and values in the paged pool, with their addresses taken once. Keeps the tensors alive.

    keys, values: [pages, page size, Hk, D], of one dtype and with the same strides, D contiguous: the model's dtype, or
    int8 codes. key_scales, value_scales: the codes' scales (kv_int8.py), [pages, Hk, page size] fp32, as far behind the
    codes of their page in both.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        assert keys.dtype == values.dtype
        assert keys.dtype in (*DTYPES, torch.int8)
        assert keys.shape == values.shape
        assert keys.stride() == values.stride()
        assert keys.stride(3) == 1
        assert keys.shape[3] % 8 == 0, f"head_dim {keys.shape[3]} is no multiple of 8"
        self.keys, self.values = keys, values
        self.key_scales, self.value_scales = key_scales, value_scales
        self.dtype = keys.dtype
        self.kv_heads, self.head_dim = keys.shape[2], keys.shape[3]
        page_stride, token_stride, head_stride, _ = keys.stride()
        scales = self._scales_offset(keys, key_scales)
        assert scales == self._scales_offset(values, value_scales)
        self.pool: Any = structures()["Pool"](
            keys.data_ptr(), values.data_ptr(), keys.shape[1], page_stride, token_stride, head_stride, scales
        )

    @staticmethod
    def _scales_offset(codes: Tensor, scales: Tensor | None) -> int:
        """Bytes from a page's start to its scales; 0 where there are none."""
        assert (scales is not None) == (codes.dtype == torch.int8)
        if scales is None:
            return 0
        pages, page_size, heads, _ = codes.shape
        assert scales.dtype == torch.float32
        assert scales.shape == (pages, heads, page_size)
        assert scales.stride()[1:] == (page_size, 1)
        assert pages == 1 or scales.stride(0) * 4 == codes.stride(0)
        assert codes.stride(0) % 4 == codes.data_ptr() % 4 == 0
        return scales.data_ptr() - codes.data_ptr()

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it holds keys and values of a model of this dtype."""
        return dtype in DTYPES and self.dtype in (dtype, torch.int8)


class CpuKernels:
    """Made by `load()`. Not for several threads at once: the scratch memory is one call's.

    fixed_order: a token's results have the same bits whatever it comes with, where they would follow from how many
    tokens its row or the step has. Not for int4.
    """

    def __init__(self, library: ctypes.CDLL, threads: int, *, fixed_order: bool = False) -> None:
        parallel = parallel_function()
        if parallel is None and threads > 1:
            logger.warning("torch's OpenMP runtime was not found: CPU kernels run on one thread")
        self.threads = threads if parallel is not None else 1
        self._destroy = library.vsl_destroy
        self.context = library.vsl_create(parallel, self.threads)
        if fixed_order:
            library.vsl_fix_order(self.context)
        self._functions = {
            name: (getattr(library, function_name(name)), structure)
            for name, structure in structures().items()
            if name.endswith("Call")
        }
        self.instruction_set: str = library.vsl_instruction_set(self.context).decode()

    def call(self, name: str, structure: Any) -> None:
        """The function that takes that structure of native/abi.h."""
        self._functions[name][0](self.context, ctypes.byref(structure))

    def _run(self, name: str, *values: Any) -> None:
        function, structure = self._functions[name]
        function(self.context, ctypes.byref(structure(*values)))

    def __del__(self) -> None:
        self._destroy(self.context)

    def paged_attention(
        self,
        query: Tensor,
        cache: LayerCache,
        query_start: Tensor,
        context_lengths: Tensor,
        page_table: Tensor,
        scale: float,
    ) -> Tensor:
        """Causal attention of every row's new tokens over its cached ones, the new ones (stored before) included.

        query: [T, Hq, D], heads contiguous in a token, tokens any distance apart; head h reads KV head h // (Hq / Hk).
        query_start: [R + 1] int32; row r has tokens query_start[r] .. query_start[r + 1], perhaps none.
        context_lengths: [R] int32, cached tokens of the row after this step; 0 marks padding, whose output is zero.
        page_table: [R, pages] int32; position p of row r is in page page_table[r, p // page size].
        Returns [T, Hq, D], contiguous; a token's bits depend on nothing else in the call. Tokens of no row have none.
        """
        tokens, heads, head_dim = query.shape
        rows = context_lengths.shape[0]
        assert cache.takes(query.dtype)
        assert query.stride()[1:] == (head_dim, 1)
        assert head_dim == cache.head_dim
        assert heads % cache.kv_heads == 0
        assert query_start.dtype == context_lengths.dtype == page_table.dtype == torch.int32
        assert query_start.shape[0] == rows + 1
        assert page_table.shape[0] == rows
        assert query_start.is_contiguous()
        assert context_lengths.is_contiguous()
        assert page_table.stride(1) == 1
        assert scale > 0
        out = query.new_empty((tokens, heads, head_dim))
        self._run(
            "PagedAttentionCall",
            DTYPES[query.dtype],
            query.data_ptr(),
            query.stride(0),
            cache.pool,
            query_start.data_ptr(),
            context_lengths.data_ptr(),
            page_table.data_ptr(),
            page_table.stride(0),
            rows,
            heads,
            cache.kv_heads,
            head_dim,
            scale,
            out.data_ptr(),
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x, and x = the RMSNorm of the sum, both in place; returns x. Both [T, N], contiguous."""
        rows, size = x.shape
        assert x.is_contiguous()
        assert weight.dtype == x.dtype == residual.dtype
        assert weight.is_contiguous()
        assert weight.shape[0] == size
        assert residual.shape == x.shape
        assert residual.is_contiguous()
        self._run(
            "AddRmsNormCall",
            DTYPES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            weight.data_ptr(),
            x.data_ptr(),
            rows,
            size,
            eps,
        )
        return x

    def qkv_rope_store(
        self,
        qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        slots: Tensor,
    ) -> Tensor:
        """Per-head RMSNorm and rotary embedding of queries and keys; keys and values go into the pool.

        qkv: [T, (Hq + 2 Hk) x D], queries first, then keys, then values. query_weight, key_weight: [D].
        cos, sin: [T, D / 2] in qkv's dtype, rows the same distance apart, sin with its own sign (no half negated):
        dimension i turns together with i + D / 2. slots: [T] int64, page x page size + place in the page.
        Returns the queries, [T, Hq, D], contiguous.
        """
        tokens, width = qkv.shape
        head_dim, kv_heads = cache.head_dim, cache.kv_heads
        heads = width // head_dim - 2 * kv_heads
        assert cache.takes(qkv.dtype)
        assert qkv.dtype == cos.dtype == sin.dtype == query_weight.dtype == key_weight.dtype
        assert (heads + 2 * kv_heads) * head_dim == width
        assert qkv.stride(1) == 1
        assert query_weight.shape[0] == key_weight.shape[0] == head_dim
        assert query_weight.is_contiguous()
        assert key_weight.is_contiguous()
        assert cos.shape == sin.shape == (tokens, head_dim // 2)
        assert cos.stride() == sin.stride() == (cos.stride(0), 1)
        assert slots.dtype == torch.int64
        assert slots.shape[0] == tokens
        assert slots.is_contiguous()
        out = qkv.new_empty((tokens, heads, head_dim))
        self._run(
            "QkvRopeStoreCall",
            DTYPES[qkv.dtype],
            qkv.data_ptr(),
            qkv.stride(0),
            query_weight.data_ptr(),
            key_weight.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            out.data_ptr(),
            cache.pool,
            slots.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate), rounded to the dtype, times up. gate_up: [T, 2 N], gate first. Returns [T, N]."""
        rows, width = gate_up.shape
        size = width // 2
        assert width % 2 == 0
        assert gate_up.stride(1) == 1
        out = gate_up.new_empty((rows, size))
        gate = gate_up.data_ptr()
        self._run(
            "SiluMulCall",
            DTYPES[gate_up.dtype],
            gate,
            gate + size * gate_up.element_size(),
            gate_up.stride(0),
            out.data_ptr(),
            rows,
            size,
        )
        return out

    def linear(self, x: Tensor, weights: SlabWeights) -> Tensor:
        """x times the matrix, transposed. x: [T, inputs], its last dimension contiguous, its rows an even number of
        elements apart; bf16, or fp32 for fp32, int8 and int4 weights. Returns [T, outputs], in x's dtype.
        """
        rows, inputs = x.shape
        assert inputs == weights.inputs
        assert x.stride(1) == 1
        assert x.stride(0) % 2 == 0
        assert weights.format != (WeightFormat.FP32 if x.dtype == torch.bfloat16 else WeightFormat.BF16)
        out = x.new_empty((rows, weights.outputs))
        self._run("LinearCall", DTYPES[x.dtype], weights.place, x.data_ptr(), x.stride(0), rows, out.data_ptr())
        return out

    def gather_rows(self, weights: SlabWeights, ids: Tensor) -> Tensor:
        """Rows of a bf16 or fp32 matrix as it was, or of what an int8 one stands for, in fp32.

        ids: [n] int32 or int64, below its outputs. Returns [n, inputs].
        """
        assert weights.format is not WeightFormat.INT4
        ids = ids.to(torch.int64).contiguous()
        dtype = torch.bfloat16 if weights.format is WeightFormat.BF16 else torch.float32
        out = torch.empty((len(ids), weights.inputs), dtype=dtype)
        scales = None if weights.scales is None else weights.scales.data_ptr()
        units = weights.data.shape[1]
        self._run("GatherRowsCall", weights.data.data_ptr(), scales, units, ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def pack(self, matrix: Tensor, weights: SlabWeights) -> None:
        """Quantise `matrix`, [outputs, inputs] bf16 or fp32, contiguous, into `weights`, int8 or int4."""
        assert matrix.is_contiguous()
        assert matrix.shape == (weights.outputs, weights.inputs)
        self._run("PackCall", DTYPES[matrix.dtype], matrix.data_ptr(), weights.place)

    def argmax(self, logits: Tensor) -> Tensor:
        """The index of each row's largest element, the lowest index on ties. logits: [T, N]. Returns [T] int64."""
        rows, size = logits.shape
        assert size > 0
        assert logits.stride(1) == 1
        out = torch.empty(rows, dtype=torch.int64)
        self._run("ArgmaxCall", DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), out.data_ptr(), rows, size)
        return out
