"""Starts torch.distributed for the ranks of one engine and builds each rank's `ParallelState`.

One machine: the ranks meet through a FileStore in the pipeline's private directory, and Gloo and NCCL are held to the
loopback interface, so nothing listens beyond it. Several nodes: they meet at rank 0's TCPStore, and use the interface
that leads there. Nothing on that network is authenticated; it must be isolated.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.runtime.errors import ConfigError

# Only a backstop: the launcher's step watchdog is far quicker.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
SETTINGS_KEY = "settings"


def init_parallel(rank: int, tp_size: int, ep_size: int, device: torch.device, store_path: Path) -> ParallelState:
    """This rank's groups on one machine; all `tp_size` ranks call it together. One rank needs and starts nothing.

    store_path: a file in a private directory that does not exist yet, the same for all ranks. CPU uses Gloo, CUDA NCCL.
    Degrees were checked before (runtime.model_config.check_parallel_degrees).
    """
    if tp_size == 1:
        return ParallelState()
    use_interface("lo0" if sys.platform == "darwin" else "lo")
    store = FileStore(str(store_path), tp_size)
    _init_group(store, rank, tp_size, device)
    return build_state(rank, tp_size, ep_size)


def init_parallel_nodes(
    rank: int,
    tp_size: int,
    ep_size: int,
    device: torch.device,
    meeting: tuple[str, int],
    settings: Mapping[str, Any],
) -> ParallelState:
    """The same over several nodes. meeting: host and port at which rank 0 listens. settings: JSON values that must be
    the same on all nodes; ConfigError, on every rank that learns of it and on rank 0, names the first that is not.
    """
    host, port = meeting
    name, own_address = interface_towards(host, port)
    use_interface(name)
    listening = _listen(own_address, host, port) if rank == 0 else None
    store = TCPStore(
        host,
        port,
        tp_size,
        is_master=rank == 0,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    compare_settings(store, rank, tp_size, settings)
    _init_group(store, rank, tp_size, device)
    return build_state(rank, tp_size, ep_size)


def relay_group(local_size: int, tp_size: int) -> dist.ProcessGroup:
    """A Gloo group of rank 0 and the ranks of the other nodes; all ranks call it together."""
    group: dist.ProcessGroup | None = dist.new_group(
        [0, *range(local_size, tp_size)], backend="gloo", timeout=COLLECTIVE_TIMEOUT
    )
    assert group is not None
    return group


def compare_settings(store: Store, rank: int, tp_size: int, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError unless all ranks pass equal settings. Rank 0 waits for the others' verdicts."""
    if rank == 0:
        store.set(SETTINGS_KEY, json.dumps(settings))
        verdicts = [store.get(f"{SETTINGS_KEY}/{other}").decode() for other in range(1, tp_size)]
        verdict = next((text for text in verdicts if text), "")
    else:
        theirs = json.loads(store.get(SETTINGS_KEY))
        ours = json.loads(json.dumps(settings))
        odd = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        verdict = "" if not odd else _difference(odd[0], rank, ours.get(odd[0]), theirs.get(odd[0]))
        store.set(f"{SETTINGS_KEY}/{rank}", verdict)
    if verdict:
        raise ConfigError(verdict)


def _difference(name: str, rank: int, ours: object, theirs: object) -> str:
    return (
        f"{name} is not the same on all nodes: {ours} where rank {rank} is, {theirs} on node 0; "
        "start every node with the same flags and the same model"
    )


def interface_towards(host: str, port: int) -> tuple[str, str]:
    """Name of the network interface that the route to `host` uses, and its address. ConfigError when there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: asks the routing table and sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"--dist-init-addr {host}:{port}: there is no route to it: {error}") from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return name, own
    raise ConfigError(f"--dist-init-addr {host}:{port}: no network interface has the address {own} that leads there")


def _listen(own_address: str, host: str, port: int) -> int:
    """A listening socket for the store, on the one address that the nodes use: by itself it would take all of them.

    Returns the descriptor, which the store takes over. Raises ConfigError when the port is taken, or the host is not
    this machine.
    """
    family = socket.AF_INET6 if ":" in own_address else socket.AF_INET
    try:
        return socket.create_server((own_address, port), family=family).detach()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(
            f"--dist-init-addr {host}:{port}: node 0 cannot listen there ({why}): give node 0's own address and a free "
            "port",
            field="dist_init_addr",
        ) from error


def use_interface(name: str) -> None:
    """Hold Gloo and NCCL to one network interface; before any group is made."""
    os.environ["GLOO_SOCKET_IFNAME"] = name
    os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"


def _init_group(store: Store, rank: int, tp_size: int, device: torch.device) -> None:
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
        world_size=tp_size,
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
