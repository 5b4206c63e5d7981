"""Chooses how a rank computes: the one place that knows the alternatives, but for matrices (matrix_formats.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from vibe_sgl_lite.model_worker.attention.cpu_backend import KernelAttention
from vibe_sgl_lite.model_worker.attention.torch_backend import TorchAttention
from vibe_sgl_lite.model_worker.cpu import CpuKernels, load
from vibe_sgl_lite.model_worker.cpu.operations import KernelOperations
from vibe_sgl_lite.model_worker.cpu.program import plan_programs
from vibe_sgl_lite.model_worker.device import CpuDevice, Device
from vibe_sgl_lite.model_worker.device_batch import StepBackend, StepGraphs
from vibe_sgl_lite.model_worker.drafting import MOST_TOKENS, DraftKernels
from vibe_sgl_lite.model_worker.kv_pool import KVLayout, KVPool
from vibe_sgl_lite.model_worker.sampling.sampler import FusedDraw
from vibe_sgl_lite.model_worker.step_input import ExpandRows
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations, TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.qwen3.model import Qwen3

CPU = torch.device("cpu")
GPU_HEAD_DIMS = (16, 32, 64, 128, 256)  # a tile's side


@dataclass(frozen=True)
class Compute:
    """Element-wise operations, and attention once there is a pool. name: for logs. kernels: for all else, if any.

    device: how a step is handed to it. kv_layout: what the attention wants of its pool. graphs: what captures the steps
    of one runner, if anything. fused_draw: see `Sampler`. expand_rows, draft_kernels: see `SlotStates`. plan_layers:
    called when a model has its weights, with the attention made for it. knows_fp8: for a KV cache.
    """

    name: str
    operations: LayerOperations
    attention: Callable[[KVPool], StepBackend]
    kernels: CpuKernels | None = None
    device: Device = field(default_factory=CpuDevice)
    kv_layout: KVLayout = KVLayout.PAGES
    graphs: StepGraphs | None = None
    fused_draw: FusedDraw | None = None
    expand_rows: ExpandRows | None = None
    draft_kernels: DraftKernels | None = None
    plan_layers: Callable[[Qwen3, Any], None] = plan_programs
    knows_fp8: bool = False


def device_of(device: torch.device) -> Device:
    """The way to work with this one."""
    if device.type != "cuda":
        return CpuDevice()
    from vibe_sgl_lite.model_worker.gpu.device import CudaDevice

    return CudaDevice(device)


def torch_compute(device: torch.device = CPU) -> Compute:
    """Plain torch: works everywhere, and is what the others are tested against."""
    return Compute("plain torch", TorchOperations(), TorchAttention, device=device_of(device))


def kernel_compute(kernels: CpuKernels) -> Compute:
    """Everything through the compiled kernels; for fp32 and bf16 on a CPU."""
    name = f"CPU kernels ({kernels.instruction_set})"
    return Compute(name, KernelOperations(kernels), lambda pool: KernelAttention(kernels, pool), kernels)


@dataclass(frozen=True)
class GpuSetup:
    """What GPU kernels are set up for. group: query heads a KV head. graph_rows, chunk_tokens: of the largest steps to
    capture, rows of any and tokens of chunks. fp8: what a KV cache in 8 bits is kept in, and not int8. tp: the ranks
    that share the vocabulary. drafts: of a row at most, that the device guesses itself. fixed_order: see
    `GpuAttention`."""

    group: int
    vocab_size: int
    max_slots: int
    graph_rows: int
    chunk_tokens: int = 0
    fp8: bool = False
    tp: Group = field(default_factory=Group)
    drafts: int = 0
    fixed_order: bool = False


def gpu_compute(device: torch.device, setup: GpuSetup) -> Compute:
    """Everything through Triton kernels and captured graphs."""
    from vibe_sgl_lite.model_worker.gpu.attention_backend import GpuAttention
    from vibe_sgl_lite.model_worker.gpu.draw import GpuDraw
    from vibe_sgl_lite.model_worker.gpu.graphs import CudaGraphs, chunk_buckets, row_buckets
    from vibe_sgl_lite.model_worker.gpu.kernels.expand_rows import expand_rows
    from vibe_sgl_lite.model_worker.gpu.kernels.speculate import LookUp
    from vibe_sgl_lite.model_worker.gpu.layers import plan_layers
    from vibe_sgl_lite.model_worker.gpu.operations import GpuOperations

    max_rows = max(setup.max_slots, setup.graph_rows)
    max_places = max(max_rows, MOST_TOKENS) if setup.drafts else max_rows
    on_device, rows, graphs = device_of(device), setup.graph_rows, None
    if rows:
        chunks = chunk_buckets(setup.chunk_tokens + rows, rows) if setup.chunk_tokens else ()
        graphs = CudaGraphs(row_buckets(rows), chunks)
    return Compute(
        f"Triton kernels, graphs of up to {rows} rows" if rows else "Triton kernels",
        GpuOperations(device),
        lambda pool: GpuAttention(
            pool,
            on_device,
            setup.group,
            max_rows,
            fp8=setup.fp8,
            width=1 + setup.drafts,
            fixed_order=setup.fixed_order,
        ),
        device=on_device,
        kv_layout=KVLayout.LAYERS,
        graphs=graphs,
        fused_draw=GpuDraw(on_device, setup.max_slots + 1, max_places, setup.vocab_size, setup.tp),
        expand_rows=expand_rows,
        draft_kernels=LookUp() if setup.drafts else None,
        plan_layers=plan_layers,
        knows_fp8=True,
    )


def choose_compute(
    dtype: torch.dtype, device: torch.device, head_dim: int, gpu: GpuSetup | None = None, *, fixed_order: bool = False
) -> Compute:
    """The fastest that this machine has for these: compiled kernels on a CPU with a compiler, Triton's on a GPU that is
    set up, else plain torch. fixed_order: see `CpuKernels`; of a GPU `gpu` says it."""
    if device.type == "cuda" and gpu is not None and head_dim in GPU_HEAD_DIMS and find_spec("triton") is not None:
        return gpu_compute(device, gpu)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and head_dim % 8 == 0:
        kernels = load(fixed_order=fixed_order)
        if kernels is not None:
            return kernel_compute(kernels)
    return torch_compute(device)
