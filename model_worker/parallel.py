"""Starts torch.distributed for the ranks of one engine and builds each rank's `ParallelState`.

On one machine the ranks meet through a FileStore in the pipeline's private directory, and Gloo and NCCL are held to the
loopback interface, so nothing listens beyond it. Over several: nodes.py.
"""

import os
import sys
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store

from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState

# Only a backstop: the launcher's step watchdog is far quicker.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def init_parallel(rank: int, tp_size: int, ep_size: int, device: torch.device, store_path: Path) -> ParallelState:
    """This rank's groups on one machine; all `tp_size` ranks call it together. One rank needs and starts nothing.

    store_path: a file in a private directory that does not exist yet, the same for all ranks. CPU uses Gloo, CUDA NCCL.
    Degrees were checked before (runtime/settings/parallel_degrees.py).
    """
    if tp_size == 1:
        return ParallelState()
    use_interface("lo0" if sys.platform == "darwin" else "lo")
    store = FileStore(str(store_path), tp_size)
    init_group(store, rank, tp_size, device)
    return build_state(rank, tp_size, ep_size)


def join_peers(parallel: ParallelState, device: torch.device) -> ParallelState:
    """The same, with sums over all ranks that GPUs of one machine do themselves, where they can; all ranks together."""
    group = parallel.tp
    if device.type != "cuda" or group.size == 1 or find_spec("triton") is None:
        return parallel
    from vibe_sgl_lite.model_worker.gpu.collectives import connect_peers

    return replace(parallel, tp=replace(group, peers=connect_peers(group.rank, group.size, device)))


def use_interface(name: str) -> None:
    """Hold Gloo and NCCL to one network interface; before any group is made."""
    os.environ["GLOO_SOCKET_IFNAME"] = name
    os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"


def init_group(store: Store, rank: int, tp_size: int, device: torch.device) -> None:
    # A look at every buffer of every captured collective: seconds at the start, for sums that are small.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=tp_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def build_state(rank: int, tp_size: int, ep_size: int) -> ParallelState:
    """The state over torch.distributed's initialised default group; all ranks call it together, in the same order."""
    split = tp_size // ep_size  # ranks that share an expert
    return ParallelState(
        rank=rank,
        tp=_group_of(rank, [list(range(tp_size))]),
        ep=_group_of(rank, [[e * split + part for e in range(ep_size)] for part in range(split)]),
        expert_tp=_group_of(rank, [[e * split + part for part in range(split)] for e in range(ep_size)]),
    )


def _group_of(rank: int, groups: list[list[int]]) -> Group:
    """Make every group, on every rank as torch.distributed demands, and return the one that has `rank`."""
    mine = Group()
    for ranks in groups:
        if len(ranks) == 1:
            continue
        process_group = dist.group.WORLD if len(groups) == 1 else dist.new_group(ranks)
        if rank in ranks:
            mine = Group(ranks.index(rank), len(ranks), process_group)
    return mine
