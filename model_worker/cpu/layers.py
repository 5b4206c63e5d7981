"""All decoder layers of a dense model on one rank as one call of the kernels (native/layers.h).

The operations are those of `CpuKernels`, with SiLU x up at the end of gate and up's product; what is saved is Python
between them, and waking the other threads for each of them. T tokens, R rows, H hidden size.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.cpu.api import DTYPES, CpuKernels, LayerCache
from vibe_sgl_lite.model_worker.cpu.linear import SLAB, SlabWeights

PARTS = ("norm", "qkv", "rope", "attention", "o", "norm", "gate_up", "down")  # of a layer, in their order


class _Matrix(Structure):
    _fields_ = (
        ("weights", c_void_p), ("scales", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("format", c_int64),
    )  # fmt: skip


class _Layer(Structure):
    _fields_ = (
        ("qkv", _Matrix), ("output", _Matrix), ("gate_up", _Matrix), ("down", _Matrix), ("attention_norm", c_void_p),
        ("query_norm", c_void_p), ("key_norm", c_void_p), ("feed_forward_norm", c_void_p), ("keys", c_void_p),
        ("values", c_void_p),
    )  # fmt: skip


class _Layers(Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)), ("count", c_int64), ("hidden", c_int64), ("heads", c_int64),
        ("kv_heads", c_int64), ("head_dim", c_int64), ("page_size", c_int64), ("page_stride", c_int64),
        ("token_stride", c_int64), ("head_stride", c_int64), ("scales", c_int64), ("split_tokens", c_int64),
        ("scale", c_float), ("eps", c_float),
    )  # fmt: skip


class _Step(Structure):
    _fields_ = (
        ("tokens", c_int64), ("rows", c_int64), ("update", c_void_p), ("residual", c_void_p), ("cos", c_void_p),
        ("sin", c_void_p), ("angle_stride", c_int64), ("slots", c_void_p), ("query_start", c_void_p),
        ("context_lengths", c_void_p), ("page_table", c_void_p), ("page_table_stride", c_int64),
        ("seconds", c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices: qkv [(Hq + 2 Hk) D, H], output [H, Hq D], gate_up [2 I, H], down [H, I]; norms [H], [D]."""

    qkv: SlabWeights
    output: SlabWeights
    gate_up: SlabWeights
    down: SlabWeights
    attention_norm: Tensor
    query_norm: Tensor
    key_norm: Tensor
    feed_forward_norm: Tensor
    cache: LayerCache


class KernelLayers:
    """Runs all of them. Keeps the weights and the caches alive. seconds: of each part of the last call, if wanted."""

    def __init__(
        self, kernels: CpuKernels, layers: Sequence[LayerWeights], *, eps: float, scale: float, split_tokens: int
    ) -> None:
        first = layers[0]
        self._run, self._context = kernels.library.vsl_decoder_layers, kernels.context
        self._layers = layers
        self._kernels = kernels
        self.dtype, self.hidden = first.attention_norm.dtype, first.qkv.inputs
        head_dim, kv_heads = first.cache.head_dim, first.cache.kv_heads
        heads = first.output.inputs // head_dim
        for layer in layers:
            assert layer.qkv.outputs == (heads + 2 * kv_heads) * head_dim
            assert layer.output.outputs == layer.gate_up.inputs == layer.down.outputs == self.hidden
            assert layer.gate_up.outputs == 2 * layer.down.inputs
            assert layer.down.inputs % SLAB == 0
            assert layer.cache.takes(self.dtype)
            assert layer.cache.arguments[2:] == first.cache.arguments[2:]
            for norm in (layer.attention_norm, layer.query_norm, layer.key_norm, layer.feed_forward_norm):
                assert norm.is_contiguous()
                assert norm.dtype == self.dtype
        self._places = (_Layer * len(layers))(*map(_place, layers))
        self._model = _Layers(
            self._places, len(layers), self.hidden, heads, kv_heads, head_dim, *first.cache.arguments[2:], split_tokens,
            scale, eps,
        )  # fmt: skip
        self.seconds: npt.NDArray[np.float64] | None = None

    def measure(self) -> None:
        """From now on, keep the seconds of every call, [layers, parts]."""
        self.seconds = np.zeros((len(self._layers), len(PARTS)))

    def __call__(
        self,
        update: Tensor,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        query_start: Tensor,
        context_lengths: Tensor,
        page_table: Tensor,
    ) -> None:
        """update, residual: [T, H], the embedding and what it is added to; then, in place, the last layer's output and
        the sum of all before. The others as `CpuKernels.qkv_rope_store` and `paged_attention` have them.
        """
        tokens, rows = update.shape[0], context_lengths.shape[0]
        assert update.shape == residual.shape == (tokens, self.hidden)
        assert update.dtype == residual.dtype == cos.dtype == sin.dtype == self.dtype
        assert update.is_contiguous()
        assert residual.is_contiguous()
        assert cos.shape == sin.shape
        assert cos.stride() == sin.stride() == (cos.stride(0), 1)
        assert slots.dtype == torch.int64
        assert slots.shape[0] == tokens
        assert slots.is_contiguous()
        assert query_start.dtype == context_lengths.dtype == page_table.dtype == torch.int32
        assert query_start.shape[0] == rows + 1
        assert query_start.is_contiguous()
        assert context_lengths.is_contiguous()
        assert page_table.shape[0] == rows
        assert page_table.stride(1) == 1
        step = _Step(
            tokens, rows, update.data_ptr(), residual.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.stride(0),
            slots.data_ptr(), query_start.data_ptr(), context_lengths.data_ptr(), page_table.data_ptr(),
            page_table.stride(0), None if self.seconds is None else self.seconds.ctypes.data,
        )  # fmt: skip
        self._run(self._context, DTYPES[self.dtype], ctypes.byref(self._model), ctypes.byref(step))


def _place(layer: LayerWeights) -> _Layer:
    def matrix(weights: SlabWeights) -> _Matrix:
        weight_format, data, scales, inputs, outputs = weights.arguments
        return _Matrix(data, scales, inputs, outputs, weight_format)

    return _Layer(
        matrix(layer.qkv),
        matrix(layer.output),
        matrix(layer.gate_up),
        matrix(layer.down),
        layer.attention_norm.data_ptr(),
        layer.query_norm.data_ptr(),
        layer.key_norm.data_ptr(),
        layer.feed_forward_norm.data_ptr(),
        *layer.cache.arguments[:2],
    )
