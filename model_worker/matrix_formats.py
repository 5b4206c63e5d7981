"""Chooses how a rank keeps its matrices, also by `--quantization`; each is made as a checkpoint's own is installed.

What is quantised: every linear layer, the head and the experts; beside int4 on a CPU the embedding, in int8, whose
error is small beside theirs. What is not: any other embedding (rows are looked up, not multiplied), norms, and the
router of MoE layers (tiny, and a wrong choice of expert is the costliest error there is), which the CPU kernels
multiply by all the same.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from vibe_sgl_lite.model_worker.cpu import CpuKernels
from vibe_sgl_lite.model_worker.cpu.huge_memory import HugeMemory
from vibe_sgl_lite.model_worker.cpu.linear import WeightFormat
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabFormat
from vibe_sgl_lite.qwen3.checkpoint import load_items
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.weight import EmbeddingWeight, ExpertWeight, MatrixWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.checkpoint import EMBEDDING, HEAD
from vibe_sgl_lite.runtime.settings.quantized_form import FP8, GPTQ

Quantization = Literal["none", "int8", "int4", "fp8"]


def choose_formats(
    model: Qwen3,
    quantization: str,
    kernels: CpuKernels | None,
    *,
    fixed_order: bool = False,
    memory: memoryview | None = None,
) -> None:
    """Let `model` keep its matrices as `quantization` says; call it before the weights are loaded. fixed_order: no
    row's product may depend on the others; kernels for a CPU know that themselves. memory: what their matrices are to
    be kept in, if it is there already.

    kernels: this machine's, if any; without them matrices stay in torch's own formats.

    Raises ConfigError (field quantization) for int8 on a GPU, int8 and int4 without the kernels, int4 on a GPU for a
    model with experts, and for fp8 elsewhere than on a GPU, in another dtype than bfloat16, or for a model with experts
    or odd sizes.
    """
    assert quantization in get_args(Quantization), quantization
    if quantization == "fp8":
        _keep_in_fp8(model)
        return
    if fixed_order and kernels is None:
        _keep_fixed(model)
        return
    if quantization == "int8" and model.device.type != "cpu":
        raise _refused(f"int8 runs on CPU only, not on {model.device.type}: use int4 or fp8, or --device cpu")
    if model.device.type == "cuda":
        if quantization == "int4" and model.config.is_moe:
            raise _refused("int4 on a GPU is for dense models, and this one has experts: use none")
        keep_as_codes(model, everything=quantization == "int4")
        return
    if kernels is None:
        if quantization != "none":
            raise _refused(
                f"{quantization} needs the CPU kernels, which could not be built (the log says why): install a C++ "
                "compiler, or use none"
            )
        return
    plain = WeightFormat.BF16 if model.dtype == torch.bfloat16 else WeightFormat.FP32
    kept = {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}.get(quantization, plain)
    store = HugeMemory(memory)
    matrix_format = SlabFormat(kernels, kept, store)
    for weight in _matrices(model):
        weight.keep_as(matrix_format)
    if kept is WeightFormat.INT4:
        model.embedding.weight.keep_as(SlabFormat(kernels, WeightFormat.INT8, store))
    plain_format = SlabFormat(kernels, plain, store)
    for layer in model.layers:
        if isinstance(layer.feed_forward, MoEBlock):
            layer.feed_forward.router.weight.keep_as(plain_format)


def _keep_fixed(model: Qwen3) -> None:
    from vibe_sgl_lite.model_worker.gpu.fixed_matrix import MULTIPLE, FixedMatrix

    weights = list(_matrices(model))
    if any(side % MULTIPLE for weight in weights for side in weight.shape):
        text = f"--deterministic on a GPU needs sides of matrices that are multiples of {MULTIPLE}, and here are others"
        raise ConfigError(text, field="deterministic")
    for weight in weights:
        weight.keep_as(FixedMatrix)


def keep_as_codes(model: Qwen3, *, everything: bool) -> None:
    """Let `model` keep the matrices of its quantised checkpoint as codes, where there are kernels for these; and, of
    `everything`, all in 4 bits. Of experts that is for fp8, in slices of whole blocks; others are plain."""
    form = model.config.quantized
    bits = 4 if everything else 0 if form is None or (form.method == GPTQ and form.bits != 4) else form.bits
    if not bits or find_spec("triton") is None:
        return
    from vibe_sgl_lite.model_worker.gpu.block_experts import BLOCK, BlockExperts
    from vibe_sgl_lite.model_worker.gpu.grouped_matrix import GroupedFormat

    grouped = GroupedFormat(bits, model.device)
    for item in load_items(model):
        weight = item.weights[0]
        quantized = form is not None and all(form.applies(part.name) for part in item.parts)
        wanted = quantized or (everything and _is_linear(item.parts[0].name))
        if wanted and isinstance(weight, MatrixWeight) and not isinstance(weight, EmbeddingWeight):
            weight.keep_as(grouped)
        if isinstance(weight, ExpertWeight) and quantized and form is not None and form.method == FP8:
            sides = [side for part in item.parts for side in part.source]
            if _has_e4m3(model.device) and all(end % BLOCK == 0 for side in sides for end in (side.start, side.stop)):
                weight.stack_format = BlockExperts


def _has_e4m3(device: torch.device) -> bool:
    """Whether Triton's kernels may have numbers of it there; before Ada they may not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _is_linear(name: str) -> bool:
    """Whether it is multiplied by, and not the router of experts."""
    return "_proj." in name or name in (HEAD, EMBEDDING)


def _keep_in_fp8(model: Qwen3) -> None:
    if model.device.type != "cuda":
        raise _refused(f"fp8 runs on a GPU only, not on {model.device.type}: use int8 or int4, or none")
    from vibe_sgl_lite.model_worker.gpu.fp8_matrix import MULTIPLE, Fp8Matrix

    if model.dtype != torch.bfloat16:
        raise _refused(f"fp8 is for bfloat16, not for {str(model.dtype).removeprefix('torch.')}: use --dtype bfloat16")
    weights = list(_matrices(model))
    if any(isinstance(weight, ExpertWeight) for weight in weights):
        raise _refused("fp8 is for dense models, and this one has experts: use none")
    if any(side % MULTIPLE for weight in weights for side in weight.shape):
        raise _refused(f"fp8 needs sides of matrices that are multiples of {MULTIPLE}, and here are others: use none")
    for weight in weights:
        weight.keep_as(Fp8Matrix)


def _refused(why: str) -> ConfigError:
    return ConfigError(f"--quantization {why}", field="quantization")


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
