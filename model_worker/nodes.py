"""Groups of ranks over several nodes (--nnodes): they meet at rank 0's TCPStore, on the interface that leads there.

Nothing on that network is authenticated; it must be isolated.

A lost group forms again at a new store of a new rank 0. A rank that comes to a store where it has been before knows
that its group is lost, and says so there: rank 0 ends itself, so that its launcher starts the next one.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from vibe_sgl_lite.model_worker.lifeline import hold_lifeline
from vibe_sgl_lite.model_worker.parallel import COLLECTIVE_TIMEOUT, build_state, init_group, use_interface
from vibe_sgl_lite.model_worker.relay import BatchRelay
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.runtime.errors import ConfigError

SETTINGS_KEY = "settings"
LOST_KEY = "lost"
RETRY_S = 0.3

T = TypeVar("T")

log = logging.getLogger(__name__)


def init_parallel_nodes(
    rank: int,
    tp_size: int,
    ep_size: int,
    device: torch.device,
    meeting: tuple[str, int],
    settings: Mapping[str, Any],
    local_size: int,
    failed: Callable[[str], None],
    patience_s: float = 0.0,
) -> tuple[ParallelState, BatchRelay | None]:
    """`init_parallel` over several nodes, and the way of batches on rank 0 and the other nodes' ranks.

    meeting: host and port at which rank 0 listens. settings: JSON values that must be the same on all nodes;
    ConfigError, on every rank that learns of it and on rank 0, names the first that is not. local_size: ranks of this
    node. failed: called in a thread with the reason when the group is lost, whatever this rank waits for; it ends the
    process. patience_s: how long the network may be away.
    """
    host, port = meeting
    deadline = time.monotonic() + patience_s
    name, own_address = _patiently(lambda: interface_towards(host, port), deadline)
    use_interface(name)
    if rank == 0:
        listening = _patiently(lambda: _listen(own_address, host, port), deadline)
        store = _store(host, port, tp_size, listening)
        watcher = threading.Thread(target=_end_when_lost, args=(_store(host, port, tp_size), failed), daemon=True)
        watcher.start()
    else:
        store = _join_new_store(host, port, tp_size, rank)
    compare_settings(store, rank, tp_size, settings)
    init_group(store, rank, tp_size, device)
    state = build_state(rank, tp_size, ep_size)
    group = relay_group(local_size, tp_size)
    if 0 < rank < local_size:
        return state, None
    lifeline = hold_lifeline(
        store, rank, range(local_size, tp_size), own_address if rank == 0 else host, COLLECTIVE_TIMEOUT.total_seconds(),
        lambda lost: failed(f"rank {lost}, of another node, has died"),
    )  # fmt: skip
    return state, BatchRelay(group, lifeline)


def _store(host: str, port: int, tp_size: int, listening: int | None = None) -> TCPStore:
    """listening: of the one that serves it. The others wait for that."""
    return TCPStore(
        host,
        port,
        tp_size,
        is_master=listening is not None,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def _join_new_store(host: str, port: int, tp_size: int, rank: int) -> TCPStore:
    """The store of a rank 0 that this rank's predecessors have not met."""
    while True:
        try:
            store = _store(host, port, tp_size)
            if store.add(f"joined/{rank}", 1) == 1:
                return store
            store.set(LOST_KEY, str(rank))
            del store
        except RuntimeError as error:  # the old one has just gone
            log.info("the store at %s:%d: %s", host, port, error)
        log.info("rank %d waits for a new rank 0", rank)
        time.sleep(RETRY_S)


def _end_when_lost(store: Store, failed: Callable[[str], None]) -> None:
    """In a thread of rank 0, which may be waiting for the lost ones in a collective."""
    while True:
        with contextlib.suppress(RuntimeError):  # nobody was lost for COLLECTIVE_TIMEOUT
            rank = store.get(LOST_KEY).decode()
            failed(f"rank {rank} has started anew, so this group is lost")
        time.sleep(RETRY_S)


def _patiently(call: Callable[[], T], deadline: float) -> T:
    """What it returns; a ConfigError only when the deadline is over."""
    while True:
        try:
            return call()
        except ConfigError as error:
            if time.monotonic() > deadline:
                raise
            log.info("%s; trying again", error)
        time.sleep(RETRY_S)


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
