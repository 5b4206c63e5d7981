"""What the ranks of test_ranks.py run: runners on the GPU backend, interpreted, that share memory as cards do."""

from dataclasses import replace
from pathlib import Path

import torch

from tests.model_worker.gpu.test_backend import PAGE, PAGES_A_SLOT, SLOTS, run
from tests.model_worker.test_model_runner import Driver, sampling
from tests.qwen3.harness import random_tokens
from vibe_sgl_lite.model_worker.compute import GpuSetup, gpu_compute
from vibe_sgl_lite.model_worker.gpu.attention_backend import AttentionPaths, GpuAttention
from vibe_sgl_lite.model_worker.gpu.collectives import PeerMemory
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Layout
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.parallel import build_state
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers import matrix as formats
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU, LAYOUT = torch.device("cpu"), Layout(1 << 14, 512, 2)
PROMPTS = [random_tokens(n, seed=n) for n in (3, 9)]
PARAMS = [sampling(), sampling(temperature=0.9, top_p=1.0, seed=11)]
COUNT = 3


def tokens(rank: int, world_size: int, folder: Path) -> list[list[int]]:
    """Of PROMPTS, the dense model of <folder>/dense on all ranks, with the chain of few rows and without, then the one
    of <folder>/moe, whose experts get all tokens, and are sent some."""
    setattr(formats, "can_pack", lambda *_: False)  # noqa: B010 - experts as a card has them
    parallel = build_state(rank, world_size, 1)
    over_experts = build_state(rank, world_size, world_size)
    regions = [torch.from_file(str(folder / f"region-{peer}"), shared=True, size=LAYOUT.nbytes, dtype=torch.uint8)
               for peer in range(world_size)]  # fmt: skip
    peers = PeerMemory([region.data_ptr() for region in regions], rank, LAYOUT, CPU, regions)
    group = replace(parallel.tp, peers=peers)
    parallel, over_experts = replace(parallel, tp=group), replace(over_experts, tp=group)
    cases: list[tuple[str, ParallelState, DispatchKind, bool]] = [
        ("dense", parallel, "all_reduce", True), ("dense", parallel, "all_reduce", False),
        ("moe", parallel, "all_reduce", False), ("moe", over_experts, "all_to_all", False),
    ]  # fmt: skip
    found: list[list[int]] = []
    for name, parallel, dispatch, chain in cases:
        config = ModelConfig.from_folder(folder / name)
        heads = config.num_attention_heads // world_size // config.local_kv_heads(world_size)
        compute = gpu_compute(CPU, GpuSetup(heads, config.vocab_size, SLOTS, 0, tp=parallel.tp))
        model = Qwen3(config, parallel, torch.float32, CPU, compute.operations, dispatch)
        load_weights(model, folder / name)
        pool = KVPool(config, world_size, SLOTS * PAGES_A_SLOT, PAGE, torch.float32, CPU, layout=compute.kv_layout)
        runner = ModelRunner(model, pool, compute, max_slots=SLOTS, context_length=PAGE * PAGES_A_SLOT, max_tokens=17)
        compute.plan_layers(model, runner.backend)
        if name == "dense":
            assert isinstance(runner.backend, GpuAttention)
            assert runner.backend.paths.chain_rows
            if not chain:
                runner.backend.paths = AttentionPaths()
        drawn = run(Driver(runner), PROMPTS, COUNT, PARAMS)
        found += [drawn[slot] for slot in range(len(PROMPTS))]
    return found
