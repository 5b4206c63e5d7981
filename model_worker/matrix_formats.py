"""Chooses how a rank keeps its matrices, also by `--quantization`; each is made as a checkpoint's own is installed.

What is quantised: every linear layer, the head and the experts. What is not: the embedding (rows are looked up, not
multiplied), norms, and the router of MoE layers (tiny, and a wrong choice of expert is the costliest error there is).
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch

from vibe_sgl_lite.model_worker.cpu import CpuKernels
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError

Quantization = Literal["none", "int8", "int4"]


def choose_formats(model: Qwen3, quantization: str, kernels: CpuKernels | None) -> None:
    """Let `model` keep its matrices as `quantization` says; call it before the weights are loaded.

    kernels: this machine's, if any; without them matrices stay in torch's own formats.

    Raises ConfigError (field quantization) for int8 and int4 on a GPU or without the kernels.
    """
    assert quantization in get_args(Quantization), quantization
    if quantization != "none" and model.device.type != "cpu":
        raise ConfigError(
            f"--quantization {quantization} runs on CPU only, not on {model.device.type}: use --device cpu, or none",
            field="quantization",
        )
    if kernels is None:
        if quantization != "none":
            raise ConfigError(
                f"--quantization {quantization} needs the CPU kernels, which could not be built (the log says why): "
                "install a C++ compiler, or use none",
                field="quantization",
            )
        return
    plain = WeightFormat.BF16 if model.dtype == torch.bfloat16 else WeightFormat.FP32
    matrix_format = SlabFormat(kernels, {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}.get(quantization, plain))
    for weight in _matrices(model):
        weight.keep_as(matrix_format)


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
