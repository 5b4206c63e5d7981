"""`--quantization`: matrices kept in 8 or 4 bits on a CPU, made one by one as a checkpoint's own are installed.

What is quantised: every linear layer, the head and the experts. What is not: the embedding (rows are looked up, not
multiplied), norms, and the router of MoE layers (tiny, and a wrong choice of expert is the costliest error there is).
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

from qwen3.mlp import MLP
from qwen3.model import Qwen3
from qwen3.quantization_int4 import GROUP_SIZE, OUTPUT_MULTIPLE, Int4Matrix
from qwen3.quantization_int8 import Int8Matrix, choose_activation_levels
from qwen3.weight import ExpertWeight, MatrixFormat, MatrixWeight
from runtime.errors import ConfigError

Quantization = Literal["none", "int8", "int4"]


def quantize(model: Qwen3, kind: str) -> None:
    """Let `model` keep its matrices as `kind` says; call it before the weights are loaded.

    Raises ConfigError (field quantization) for a GPU, a CPU without the kernels, or a matrix that int4 cannot hold.
    """
    assert kind in get_args(Quantization), kind
    if kind == "none":
        return
    if model.device.type != "cpu":
        raise ConfigError(
            f"--quantization {kind} runs on CPU only, not on {model.device.type}: use --device cpu, or none",
            field="quantization",
        )
    matrix_format = _int8_format() if kind == "int8" else Int4Matrix
    for weight in _matrices(model):
        if kind == "int4":
            _check_int4(weight)
        weight.keep_as(matrix_format)


def _int8_format() -> MatrixFormat:
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
