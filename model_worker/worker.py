"""One rank, in a process of its own (process.py).

It joins its groups, loads its share of the weights, takes its KV pool, says that it is ready, and then runs every
`ForwardBatch` that the scheduler sends until it is told to stop. Rank 0 answers.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from vibe_sgl_lite.model_worker.early_memory import EarlyMemory
from vibe_sgl_lite.model_worker.host_pages import HostPages, host_slots
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.nodes import init_parallel_nodes
from vibe_sgl_lite.model_worker.page_files import PageFiles
from vibe_sgl_lite.model_worker.parallel import init_parallel, join_peers
from vibe_sgl_lite.model_worker.rank_digest import RankDigest
from vibe_sgl_lite.model_worker.relay import BatchRelay
from vibe_sgl_lite.model_worker.resident import Resident
from vibe_sgl_lite.model_worker.runner_setup import LoadProgress, build_runner, too_little_left
from vibe_sgl_lite.model_worker.step_pipeline import StepPipeline
from vibe_sgl_lite.model_worker.step_timer import StepTimer, time_collectives
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import HEARTBEAT_S, Child, PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    ForwardBatch,
    LoadWeights,
    Message,
    PageMoves,
    RankDone,
    RankInput,
    RankReady,
    Shutdown,
    SleepRank,
    StopRank,
    WakeRank,
    Weights,
)
from vibe_sgl_lite.runtime.settings.address import split_host_port
from vibe_sgl_lite.runtime.settings.server_args import flag_name
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender

CONNECT_S = 10.0  # for the scheduler's connection, which takes a fraction of a second
SHUTDOWN_GRACE_S = 1.0  # for the scheduler's StopRank, which ends all ranks at the same step
# Settings that nodes may have of their own.
NODES_OWN = {
    "model_path", "tokenizer_path", "name", "address", "node_rank", "dist_init_addr", "num_threads", "device", "dtype",
    "context_length", "log_level", "trace", "profile", "restart", "max_restarts", "rejoin_timeout", "server_key",
    "client_keys", "draft_model_path",
}  # fmt: skip

log = logging.getLogger(__name__)


def main(child: Child, rank: int, memory: EarlyMemory | None) -> None:
    """One rank's life, from its groups to the end of its loop. memory: for its matrices."""
    spec, args = child.spec, child.spec.args
    # Bound before the slow part, so that the scheduler can connect and send at any time.
    inbox: Receiver[RankInput] | None = None
    if args.node_rank == 0:
        inbox = Receiver(child.context, spec.endpoints.rank(rank), RankInput, awaits_sender=True)
    outbox = Sender(child.context, spec.endpoints.results) if rank == 0 else None

    index = rank - args.local_ranks.start
    device = torch.device("cpu") if spec.device == "cpu" else torch.device(spec.device, index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for every new shape, tens of milliseconds at each step of a growing context.
        torch.backends.cuda.enable_cudnn_sdp(False)
    parallel, relay = _join(child, rank, device)
    timer = _timer(device) if args.profile is not None and rank == 0 else None
    if timer is not None:
        parallel = time_collectives(parallel, timer)

    def build(spec: PipelineSpec, model: Qwen3 | None) -> ModelRunner:
        runner = build_runner(spec, parallel, device, child.heartbeat, timer or NO_TIMER, model, memory)
        try:
            runner.warm_up()
        except torch.OutOfMemoryError as error:
            raise ConfigError(too_little_left(args.mem_fraction_static), field="mem_fraction_static") from error
        if timer is not None:
            timer.mark(OTHER)
            timer.take()  # a profile begins with the first request
        return runner

    def answer(message: Message) -> None:
        if outbox is not None:
            outbox.send(message)

    def ready(runner: ModelRunner, weights: Weights) -> StepPipeline:
        answer(
            RankReady(
                runner.pool.num_pages, spec.device, spec.dtype, spec.endpoints.epoch, runner.pool.page_bytes,
                f"{runner.compute_name}: {runner.pool.format}", 0 if host is None else host.slots, weights,
            )
        )  # fmt: skip
        return StepPipeline(runner, answer, digest)

    digest = RankDigest(parallel.tp, device) if args.debug_rank_digest else None
    resident = Resident(spec, build, parallel.tp, device, LoadProgress(child.heartbeat, visible=False))
    assert resident.runner is not None
    files, host = None, None  # only where the ranks never sleep
    if args.hicache_size:
        slots = host_slots(args.hicache_size, resident.runner.pool.page_bytes, args.tp)
        host = HostPages(resident.runner.pool, slots)
    if args.cache_dir is not None:
        files = PageFiles(
            Path(args.cache_dir), resident.runner.pool, resident.runner.device, rank, args.tp,
            lambda: Sender(child.context, spec.endpoints.results).send,
        )  # fmt: skip
    if inbox is not None:
        _await_scheduler(child, inbox)
    steps: StepPipeline | None = ready(resident.runner, spec.weights)
    child.ready()
    if inbox is None:
        assert relay is not None
        assert steps is not None
        _follow(child, steps, relay)
    else:
        while (message := _serve(child, steps, inbox, relay, files, host)) is not None:
            match message:
                case LoadWeights():
                    answer(RankDone(resident.load(message), spec.endpoints.epoch))
                case SleepRank(level=level):
                    steps = None
                    resident.sleep(level)
                    answer(RankDone(epoch=spec.endpoints.epoch))
                case WakeRank(weights=weights):
                    steps = ready(resident.wake(weights), weights)
        inbox.close()
    if files is not None:
        files.close()
    if outbox is not None:
        outbox.close()


def _await_scheduler(child: Child, inbox: Receiver[RankInput]) -> None:
    """Until the scheduler is connected: a rank that is ready gets what is sent to it, even if its run directory is
    removed that moment."""
    deadline = time.monotonic() + CONNECT_S
    while not inbox.connected(HEARTBEAT_S) and time.monotonic() < deadline:
        child.heartbeat()


def _timer(device: torch.device) -> StepTimer:
    if device.type != "cuda":
        return StepTimer()
    from vibe_sgl_lite.model_worker.gpu.device_timer import DeviceTimer

    return DeviceTimer()


def _join(child: Child, rank: int, device: torch.device) -> tuple[ParallelState, BatchRelay | None]:
    """This rank's groups; and, on rank 0 and on other nodes, the way of batches from the one to the others."""
    spec, args = child.spec, child.spec.args
    if args.dist_init_addr is None:
        parallel = init_parallel(rank, args.tp, args.ep, device, Path(spec.endpoints.rendezvous))
        return parallel if args.disable_custom_all_reduce else join_peers(parallel, device), None
    meeting = split_host_port(args.dist_init_addr)
    patience_s = args.rejoin_timeout if spec.endpoints.epoch else 0.0
    return init_parallel_nodes(
        rank, args.tp, args.ep, device, meeting, _shared_settings(spec), len(args.local_ranks), child.fail_at_once,
        patience_s,
    )  # fmt: skip


def _shared_settings(spec: PipelineSpec) -> dict[str, Any]:
    """What must be the same on all nodes, by the names that a user knows."""
    args = msgspec.to_builtins(spec.args)
    shared = {flag_name(name): value for name, value in args.items() if name not in NODES_OWN}
    resolved = {"--device": spec.device, "--dtype": spec.dtype, "--context-length": spec.context_length}
    resolved |= {"--page-size": spec.page_size, "--chunked-prefill-size": spec.chunked_prefill_size}
    return shared | resolved | {f"config.json: {k}": v for k, v in msgspec.to_builtins(spec.model).items()}


def _serve(
    child: Child,
    steps: StepPipeline | None,
    inbox: Receiver[RankInput],
    relay: BatchRelay | None,
    files: PageFiles | None,
    host: HostPages | None,
) -> LoadWeights | SleepRank | WakeRank | None:
    """Run the scheduler's batches until StopRank, and pass them on; or until it wants something else: returns that.
    Sleeps in a poll while there is nothing to do. steps: None while there is nothing to run them with.

    The launcher's Shutdown alone ends the loop a little later: the scheduler gets one too, and its StopRank comes after
    the last batch, so that no rank leaves in the middle of a step.
    """
    poller = zmq.Poller()
    poller.register(inbox.socket, zmq.POLLIN)
    poller.register(child.control, zmq.POLLIN)
    device = None if steps is None else steps.device
    if device is not None and device.completion_fd is not None:
        poller.register(device.completion_fd, zmq.POLLIN)
    timer, leave_at = NO_TIMER if steps is None else steps.timer, math.inf
    while time.monotonic() < leave_at:
        timer.mark("idle")
        ready = dict(poller.poll(int(HEARTBEAT_S * 1000)))
        timer.mark(OTHER)
        child.heartbeat()
        if child.control in ready and any(isinstance(command, Shutdown) for command in child.commands()):
            leave_at = time.monotonic() + SHUTDOWN_GRACE_S
        if steps is not None and steps.device.completion_fd in ready:
            steps.device.acknowledge()
            steps.collect_done()
        if inbox.socket not in ready:
            if relay is not None and not ready:
                relay.send(b"")
            if steps is not None and not ready:
                steps.idle()
            continue
        timer.mark("unpack")
        message = inbox.receive(0)
        if message is None:
            # The other ranks decoded the same bytes or will fail too; going on would leave ranks that disagree.
            raise RuntimeError("a batch from the scheduler could not be decoded")
        if message.epoch != child.spec.endpoints.epoch:
            continue
        if isinstance(message, PageMoves):
            mover = host if message.host else files
            assert mover is not None
            mover.take(message)
            continue
        timer.mark("relay")
        if relay is not None:
            relay.send(msgspec.msgpack.encode(message))
        timer.mark(OTHER)
        if isinstance(message, StopRank):
            if relay is not None:
                relay.close()
            return None
        if not isinstance(message, ForwardBatch):
            return message
        assert steps is not None, "a step while the rank sleeps"
        steps.launch(message)
    return None


def _follow(child: Child, steps: StepPipeline, relay: BatchRelay) -> None:
    """On a node without a scheduler: run what rank 0 passes on, until StopRank or this node's launcher's Shutdown."""
    decoder: msgspec.msgpack.Decoder[RankInput] = msgspec.msgpack.Decoder(RankInput)
    while True:
        frame = relay.receive()
        child.heartbeat()
        if any(isinstance(command, Shutdown) for command in child.commands()):
            return
        steps.collect_done()
        if not frame:
            continue
        message = decoder.decode(frame)
        if isinstance(message, StopRank):
            relay.close()
            return
        assert isinstance(message, ForwardBatch)
        steps.launch(message)
