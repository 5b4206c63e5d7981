"""Chooses how a rank keeps its matrices, also by `--quantization`; each is made as a checkpoint's own is installed.

What is quantised: every linear layer, the head and the experts. What is not: the embedding (rows are looked up, not
multiplied), norms, and the router of MoE layers (tiny, and a wrong choice of expert is the costliest error there is).
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import torch

from vibe_sgl_lite.model_worker.cpu import CpuKernels
from vibe_sgl_lite.model_worker.cpu.linear import INPUT_MULTIPLE, WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormats
from vibe_sgl_lite.qwen3.layers.quantization_int4 import GROUP_SIZE, OUTPUT_MULTIPLE, Int4Matrix
from vibe_sgl_lite.qwen3.layers.quantization_int8 import Int8Matrix, choose_activation_levels
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixFormat, MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError

Quantization = Literal["none", "int8", "int4"]


def choose_formats(model: Qwen3, quantization: str, kernels: CpuKernels | None) -> None:
    """Let `model` keep its matrices as `quantization` says; call it before the weights are loaded.

    kernels: this machine's, if any; what they cannot multiply, torch's own kernels do.

    Raises ConfigError (field quantization) for a GPU, a CPU without the kernels, or a matrix that int4 cannot hold.
    """
    assert quantization in get_args(Quantization), quantization
    if quantization != "none" and model.device.type != "cpu":
        raise ConfigError(
            f"--quantization {quantization} runs on CPU only, not on {model.device.type}: use --device cpu, or none",
            field="quantization",
        )
    fast = _kernel_format(model.dtype, quantization, kernels)
    for weight in _matrices(model):
        if quantization == "int4":
            _check_int4(weight)
        if fast is not None and weight.shape[-1] % INPUT_MULTIPLE == 0:
            weight.keep_as(fast)
        elif quantization != "none":
            weight.keep_as(Int4Matrix if quantization == "int4" else _torch_int8())


def _kernel_format(dtype: torch.dtype, quantization: str, kernels: CpuKernels | None) -> MatrixFormat | None:
    """The kernels' format, if they have one."""
    if kernels is None:
        return None
    formats = SlabFormats(kernels)
    if quantization == "int4":
        return formats.int4
    if quantization == "int8":
        return formats.int8 if kernels.can_multiply(WeightFormat.INT8) else None
    return formats.bf16 if dtype == torch.bfloat16 else None


def _torch_int8() -> MatrixFormat:
    levels = choose_activation_levels()
    if levels is None:
        raise ConfigError(
            "--quantization int8 needs a torch with oneDNN's kernels for this CPU: use int4 or none",
            field="quantization",
        )
    return partial(Int8Matrix, activation_levels=levels)


def _matrices(model: Qwen3) -> Iterator[MatrixWeight | ExpertWeight]:
    for layer in model.layers:
        yield layer.attention.qkv.weight
        yield layer.attention.output.weight
        if isinstance(layer.feed_forward, MLP):
            yield layer.feed_forward.gate_up.weight
            yield layer.feed_forward.down.weight
        else:
            yield layer.feed_forward.experts.gate_up
            yield layer.feed_forward.experts.down
    yield model.head.weight


def _check_int4(weight: MatrixWeight | ExpertWeight) -> None:
    out_features, in_features = weight.shape[-2:]
    if in_features % GROUP_SIZE or out_features % OUTPUT_MULTIPLE:
        raise ConfigError(
            f"--quantization int4 needs matrices with inputs in groups of {GROUP_SIZE} and outputs in multiples of "
            f"{OUTPUT_MULTIPLE}, but a rank of this model has one of {in_features} inputs and {out_features} outputs: "
            "use a smaller --tp, or int8",
            field="quantization",
        )
