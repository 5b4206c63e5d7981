"""How many KV pages a rank takes: from the memory that it may use, the same number on all of them."""

from dataclasses import dataclass

import torch

from vibe_sgl_lite.model_worker.kv_pool import bytes_per_token
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.machine import Limit, available_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

# A laptop has other things to do with its memory; --max-total-tokens asks for more.
CPU_LIMIT_BYTES = 4 << 30
# Of a machine's memory, what the cache leaves to the other processes, which may still be starting, and to steps.
# An estimate from resident memory with Qwen3-0.6B's vocabulary: 170 MB after the pages were counted, 50 in steps.
HEADROOM_BYTES = 256 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Usable pages, one for padding not counted, and all that led to them in words, for the log."""

    num_pages: int
    words: str


def plan_memory(
    config: ModelConfig,
    world: Group,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_fraction: float,
    max_total_tokens: int | None,
    weight_bytes: int,
    ranks_on_machine: int,
    int8: bool = False,
    draft: ModelConfig | None = None,
) -> MemoryPlan:
    """The cache's size; all ranks call it together, after their weights are loaded. The smallest rank decides.

    With `max_total_tokens`, the pages for that many tokens. Else weights and cache together take `memory_fraction` of
    what is free without them; on CPU the ranks of a machine share that memory, less HEADROOM_BYTES, and the cache takes
    at most CPU_LIMIT_BYTES of it in all. weight_bytes: what this rank's weights already take. draft: a second model,
    whose cache has as many pages.

    Raises ConfigError, on all ranks, when not even one page fits, or `max_total_tokens` do not.
    """
    models = (config,) if draft is None else (config, draft)
    page_bytes = page_size * sum(bytes_per_token(model, world.size, dtype, int8=int8) for model in models)
    limit = free_memory(device)
    sharing = ranks_on_machine if device.type == "cpu" else 1  # a GPU belongs to one rank
    in_all = int(limit.value) // sharing  # what tokens that are asked for may take: who asks knows
    free = max(0, int(limit.value) - (HEADROOM_BYTES if device.type == "cpu" else 0)) // sharing
    budget = int((free + weight_bytes) * memory_fraction) - weight_bytes
    why = f"{memory_fraction:g} of it, --mem-fraction-static"
    if device.type == "cpu" and budget > CPU_LIMIT_BYTES // ranks_on_machine:
        budget = CPU_LIMIT_BYTES // ranks_on_machine
        why = f"the most without --max-total-tokens, {CPU_LIMIT_BYTES >> 30} GiB a machine"
    most = torch.tensor([budget // page_bytes - 1, in_all // page_bytes - 1], dtype=torch.int64, device=device)
    pages, possible = (int(count) for count in world.all_reduce_min(most))
    source = f"{free / 2**30:.2f} GiB free a rank ({limit.source})"
    if max_total_tokens is not None:
        pages, why = max_total_tokens // page_size, f"--max-total-tokens {max_total_tokens}"
        if pages > max(0, possible) and pages:
            raise ConfigError(
                f"--max-total-tokens {max_total_tokens} needs {pages * page_bytes / 2**30:.2f} GiB of KV cache a rank, "
                f"but there are {source}: ask for at most {max(0, possible) * page_size}, or leave it out",
                field="max_total_tokens",
            )
    if pages < 1:
        raise ConfigError(
            f"the KV cache has no room for one page of page_size={page_size} tokens ({page_bytes / 2**20:.1f} MiB), "
            f"with {source}: "
            + (
                f"raise --max-total-tokens (now {max_total_tokens}) to {page_size} or more"
                if max_total_tokens is not None
                else f"free some memory or raise --mem-fraction-static (now {memory_fraction:g})"
            ),
            field="max_total_tokens" if max_total_tokens is not None else "mem_fraction_static",
        )
    words = (
        f"weights {weight_bytes / 2**30:.2f} GiB; {source}; {pages} KV pages of {page_size} tokens, "
        f"{pages * page_bytes / 2**30:.2f} GiB ({why})"
    )
    return MemoryPlan(pages, words)


def free_memory(device: torch.device) -> Limit:
    """Memory that could be allocated on `device` now, in bytes."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return Limit(free, "the GPU")
    return available_memory()
