"""The rank process, started by the launcher with a spec file and its rank (runtime/launcher/boot.py).

It joins its groups, loads its share of the weights, takes its KV pool, says that it is ready, and then runs every
`ForwardBatch` that the scheduler sends until it is told to stop. Rank 0 answers.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from vibe_sgl_lite.model_worker.batch import Drafter
from vibe_sgl_lite.model_worker.compute import Compute, GpuSetup, choose_compute
from vibe_sgl_lite.model_worker.cpu.shared_memory import share_memory
from vibe_sgl_lite.model_worker.draft_model import DraftModel
from vibe_sgl_lite.model_worker.host_pages import HostPages, host_slots
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.memory_plan import plan_memory
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.ngram import NgramDrafter
from vibe_sgl_lite.model_worker.nodes import init_parallel_nodes, relay_group
from vibe_sgl_lite.model_worker.page_files import PageFiles
from vibe_sgl_lite.model_worker.parallel import init_parallel, join_peers
from vibe_sgl_lite.model_worker.pending_step import PendingStep
from vibe_sgl_lite.model_worker.rank_digest import RankDigest
from vibe_sgl_lite.model_worker.relay import BatchRelay
from vibe_sgl_lite.model_worker.resident import Resident, fill
from vibe_sgl_lite.model_worker.step_timer import StepTimer, time_collectives
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER, PartTimer
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import HEARTBEAT_S, Child, PipelineSpec, run_child
from vibe_sgl_lite.runtime.launcher.spawn import RANK_PREFIX
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
    StepResult,
    StepTimes,
    StopRank,
    WakeRank,
    Weights,
)
from vibe_sgl_lite.runtime.settings.address import split_host_port
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.machine import usable_cores
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig, check_parallel_degrees
from vibe_sgl_lite.runtime.settings.server_args import flag_name
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender

DRAFT_PATH = "draft_model_path"
MOST_TILE = 64  # rows of queries that attention takes together
MAX_IN_FLIGHT = 3  # steps: one runs while the next ones wait on the device; the scheduler sends no more
SHUTDOWN_GRACE_S = 1.0  # for the scheduler's StopRank, which ends all ranks at the same step
# Settings that nodes may have of their own.
NODES_OWN = {
    "model_path", "tokenizer_path", "name", "address", "node_rank", "dist_init_addr", "num_threads", "device", "dtype",
    "context_length", "log_level", "trace", "profile", "restart", "max_restarts", "rejoin_timeout", "server_key",
    "client_keys", "draft_model_path",
}  # fmt: skip
DISPATCH: Mapping[str, DispatchKind] = {"all-reduce": "all_reduce", "all-to-all": "all_to_all"}

log = logging.getLogger(__name__)


def main(child: Child) -> None:
    """One rank's life, from its groups to the end of its loop."""
    spec, rank = child.spec, _rank()
    args = spec.args
    # Bound before the slow part, so that the scheduler can connect and send at any time.
    inbox: Receiver[RankInput] | None = None
    if args.node_rank == 0:
        inbox = Receiver(child.context, spec.endpoints.rank(rank), RankInput)
    outbox = Sender(child.context, spec.endpoints.results) if rank == 0 else None

    index = rank - args.local_ranks.start
    device = torch.device("cpu") if spec.device == "cpu" else torch.device(spec.device, index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for every new shape, tens of milliseconds at each step of a growing context.
        torch.backends.cuda.enable_cudnn_sdp(False)
    parallel, relay = _join(spec, rank, device)
    timer = StepTimer() if args.profile is not None and rank == 0 else None
    if timer is not None:
        parallel = time_collectives(parallel, timer)

    def build(spec: PipelineSpec, model: Qwen3 | None) -> ModelRunner:
        runner = build_runner(spec, parallel, device, child.heartbeat, timer or NO_TIMER, model)
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
    resident = Resident(spec, build, parallel.tp, device, _Progress(child.heartbeat, visible=False))
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


def too_little_left(fraction: float) -> str:
    """What to tell of a card on which weights and KV cache left no room for the largest step and the graphs."""
    return (
        f"--mem-fraction-static {fraction:g} leaves too little of the GPU's memory for the largest step and graphs: "
        "lower it, or lower --chunked-prefill-size or --max-running-requests"
    )


def _join(spec: PipelineSpec, rank: int, device: torch.device) -> tuple[ParallelState, BatchRelay | None]:
    """This rank's groups; and, on rank 0 and on other nodes, the way of batches from the one to the others."""
    args = spec.args
    if args.dist_init_addr is None:
        parallel = init_parallel(rank, args.tp, args.ep, device, Path(spec.endpoints.rendezvous))
        return parallel if args.disable_custom_all_reduce else join_peers(parallel, device), None
    meeting = split_host_port(args.dist_init_addr)
    patience_s = args.rejoin_timeout if spec.endpoints.epoch else 0.0
    parallel = init_parallel_nodes(rank, args.tp, args.ep, device, meeting, _shared_settings(spec), patience_s)
    local_size = len(args.local_ranks)
    group = relay_group(local_size, args.tp)
    return parallel, BatchRelay(group) if rank == 0 or rank >= local_size else None


def _shared_settings(spec: PipelineSpec) -> dict[str, Any]:
    """What must be the same on all nodes, by the names that a user knows."""
    args = msgspec.to_builtins(spec.args)
    shared = {flag_name(name): value for name, value in args.items() if name not in NODES_OWN}
    resolved = {"--device": spec.device, "--dtype": spec.dtype, "--context-length": spec.context_length}
    resolved |= {"--page-size": spec.page_size, "--chunked-prefill-size": spec.chunked_prefill_size}
    return shared | resolved | {f"config.json: {k}": v for k, v in msgspec.to_builtins(spec.model).items()}


def build_runner(
    spec: PipelineSpec,
    parallel: ParallelState,
    device: torch.device,
    heartbeat: Callable[[], None],
    timer: PartTimer = NO_TIMER,
    model: Qwen3 | None = None,
) -> ModelRunner:
    """Load this rank's weights and take its KV pool; all ranks together. `heartbeat` is called while it goes on.
    model: one with weights, which is then the runner's.

    Raises UserError for what is wrong with the model folder or with the settings.
    """
    args = spec.args
    dtype: torch.dtype = getattr(torch, spec.dtype)
    compute = choose_compute(
        dtype, device, spec.model.head_dim, _gpu_setup(spec, parallel), fixed_order=args.deterministic
    )
    _check(spec, compute)
    started = time.monotonic()
    if model is None:
        if compute.kernels is not None and args.dist_init_addr is None:
            parallel = share_memory(parallel, compute.kernels)
        model = Qwen3(spec.model, parallel, dtype, device, compute.operations, DISPATCH[args.moe_dispatch])
        choose_formats(model, args.quantization, compute.kernels, fixed_order=args.deterministic)
        progress = _Progress(heartbeat, visible=parallel.rank == 0 and sys.stderr.isatty())
        fill(model, spec.weights, args.seed, progress)
    draft = None if args.draft_model_path is None else _load_draft(spec, model.parallel, device, compute, heartbeat)
    eight_bits = args.kv_cache_dtype != "auto"
    plan = plan_memory(
        spec.model,
        parallel.tp,
        page_size=spec.page_size,
        dtype=dtype,
        device=device,
        memory_fraction=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
        weight_bytes=weight_bytes(model) + (0 if draft is None else weight_bytes(draft)),
        ranks_on_machine=len(args.local_ranks),
        int8=eight_bits,
        draft=None if draft is None else draft.config,
    )
    pool = KVPool(
        spec.model, parallel.tp.size, plan.num_pages, spec.page_size, dtype, device, int8=eight_bits,
        layout=compute.kv_layout,
    )  # fmt: skip
    loaded = time.monotonic()
    pool.make_ready(len(args.local_ranks), heartbeat)
    drafter: Drafter | None = None
    if draft is not None:
        of_draft = KVPool(
            draft.config, parallel.tp.size, plan.num_pages, spec.page_size, dtype, device, int8=eight_bits,
            layout=compute.kv_layout,
        )  # fmt: skip
        of_draft.make_ready(len(args.local_ranks), heartbeat)
        drafter = DraftModel(draft, of_draft, compute, args.draft_tokens)
    elif args.draft_tokens and compute.draft_kernels is None:
        drafter = NgramDrafter(args.draft_tokens)
    log.info(
        "weights loaded in %.1f s: %s; %d threads (%s); %s",
        loaded - started,
        plan.words,
        torch.get_num_threads(),
        f"a share of {usable_cores().source}" if args.num_threads is None else "--num-threads",
        compute.name,
    )
    runner = ModelRunner(
        model,
        pool,
        compute,
        max_slots=args.max_running_requests,
        context_length=spec.context_length,
        max_tokens=spec.chunked_prefill_size + args.max_running_requests * (1 + args.draft_tokens),
        tokenizer_file=_tokenizer_file(spec),
        timer=timer,
        drafter=drafter,
        device_drafts=0 if compute.draft_kernels is None else _device_drafts(spec),
    )
    compute.plan_layers(model, runner.backend)
    return runner


def _load_draft(
    spec: PipelineSpec, parallel: ParallelState, device: torch.device, compute: Compute, heartbeat: Callable[[], None]
) -> Qwen3:
    """The model of --draft-model-path, with its weights. Raises ConfigError for one that does not fit."""
    args = spec.args
    folder = Path(str(args.draft_model_path))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--draft-model-path {folder} has no config.json: give a model's folder", field=DRAFT_PATH)
    config = ModelConfig.from_folder(folder)
    if args.load_format != "dummy":
        config = settle(config, folder)
    check_parallel_degrees(config, args.tp, args.ep)
    if config.vocab_size != spec.model.vocab_size:
        vocabularies = f"{config.vocab_size} entries, the model's {spec.model.vocab_size}"
        text = f"--draft-model-path {folder}: its vocabulary has {vocabularies}: take a Qwen3 with the same one"
        raise ConfigError(text, field=DRAFT_PATH)
    model = Qwen3(config, parallel, getattr(torch, spec.dtype), device, compute.operations, DISPATCH[args.moe_dispatch])
    choose_formats(model, args.quantization, compute.kernels, fixed_order=args.deterministic)
    progress = _Progress(heartbeat, visible=False)
    if args.load_format == "dummy":
        load_dummy_weights(model, args.seed, progress)
    else:
        load_weights(model, folder, progress)
    return model


def _check(spec: PipelineSpec, compute: Compute) -> None:
    """Raises ConfigError for what is asked of a device that does not have it."""
    args = spec.args
    if args.kv_cache_dtype == "fp8" and not compute.knows_fp8:
        raise ConfigError(
            f"--kv-cache-dtype fp8 needs Triton's kernels: this is {compute.name}", field="kv_cache_dtype"
        )
    if args.draft_model_path is not None and spec.device != "cpu":
        raise ConfigError("--draft-model-path runs on a CPU: use --speculative-algorithm ngram", field=DRAFT_PATH)
    if args.draft_tokens and spec.device != "cpu" and compute.draft_kernels is None:
        raise ConfigError(
            f"--speculative-algorithm {args.speculative_algorithm} on a GPU needs Triton: this is {compute.name}",
            field="speculative_algorithm",
        )
    has_kernels = compute.kernels is not None or compute.knows_fp8
    if args.deterministic and (not has_kernels or spec.model.is_moe):
        what = "a model with experts" if spec.model.is_moe else compute.name
        raise ConfigError(
            f"--deterministic is for dense models through compiled kernels: this is {what}", field="deterministic"
        )
    if args.deterministic and spec.device != "cpu" and (args.tp > 1 or args.quantization != "none"):
        raise ConfigError(
            "--deterministic on a GPU is for one rank and plain matrices: leave out --tp and --quantization, or it",
            field="deterministic",
        )


def _gpu_setup(spec: PipelineSpec, parallel: ParallelState) -> GpuSetup:
    """No graphs of experts that are sent to: the host has to know how many rows go where."""
    args, tp = spec.args, parallel.tp.size
    graph_rows = args.cuda_graph_max_bs or args.max_running_requests
    sends_to_experts = spec.model.is_moe and args.moe_dispatch == "all-to-all"
    return GpuSetup(
        group=spec.model.num_attention_heads // tp // spec.model.local_kv_heads(tp),
        vocab_size=spec.model.vocab_size,
        max_slots=args.max_running_requests,
        graph_rows=0 if args.disable_cuda_graph or sends_to_experts else graph_rows,
        chunk_tokens=spec.chunked_prefill_size,
        fp8=args.kv_cache_dtype == "fp8",
        tp=parallel.tp,
        drafts=_device_drafts(spec),
        fixed_order=args.deterministic,
    )


def _device_drafts(spec: PipelineSpec) -> int:
    """Drafts that a GPU makes for a row at most: attention has all of a KV head's query heads for them in one tile."""
    group = spec.model.num_attention_heads // spec.model.num_key_value_heads
    return min(spec.args.draft_tokens, max(1, MOST_TILE // group - 1))


def _tokenizer_file(spec: PipelineSpec) -> Path:
    """The tokenizer manager's file; on other nodes, which have none, the folder's, or one made of it here."""
    folder, file = Path(spec.tokenizer_folder), Path(spec.endpoints.tokenizer_file)
    if spec.args.node_rank == 0:
        return file
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer  # slow to import, rarely needed

    ChatTokenizer.from_folder(folder).write_json(file)
    return file


class StepPipeline:
    """Launches steps as they come and hands on their results, the earliest first, with at most three in flight.

    With a digest, makes sure that all ranks do the same; with a timer, tells where the time went. Either takes steps
    one at a time.
    """

    def __init__(
        self,
        runner: ModelRunner,
        send: Callable[[StepResult], None],
        digest: RankDigest | None = None,
    ) -> None:
        """send: called with every result, in order. The runner's timer, if it is a `StepTimer`, times all of it."""
        self.timer = runner.timer
        if isinstance(self.timer, StepTimer):
            self.timer.mark(OTHER)
            self.timer.take()  # what the start took belongs to no step
        self._runner = runner
        self._send = send
        self._digest = digest
        self.device = runner.device
        self._in_flight: deque[PendingStep] = deque()

    def launch(self, batch: ForwardBatch) -> None:
        """Run the batch; hand on what is done. Raises RuntimeError when the ranks disagree: before the step about its
        batch, after it about its tokens."""
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._collect()
        if self._digest is not None:
            self._digest.check(batch.step, "batch", msgspec.msgpack.encode(batch))
        between = self.timer.take() if isinstance(self.timer, StepTimer) else {}
        began = self.timer.began if isinstance(self.timer, StepTimer) else 0.0
        self._in_flight.append(self._runner.launch(batch))
        if self._digest is not None or self.timer.measures:
            self._collect(began, between)
        self.collect_done()

    def collect_done(self) -> None:
        """Hand on the results of the steps that are done."""
        while self._in_flight and self._in_flight[0].done():
            self._collect()

    def _collect(self, began: float = 0.0, between: Mapping[str, float] | None = None) -> None:
        result = self._runner.collect(self._in_flight.popleft())
        if self._digest is not None:
            self._digest.check(result.step, "sample", result.token_ids)
        if isinstance(self.timer, StepTimer) and between is not None:
            result = msgspec.structs.replace(result, times=StepTimes(began, dict(between), self.timer.take()))
        self.timer.mark("send")
        self._send(result)
        self.timer.mark(OTHER)


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
            return
        assert isinstance(message, ForwardBatch)
        steps.launch(message)


class _Progress:
    """Keeps the launcher informed while weights load, and a person at a terminal."""

    def __init__(self, heartbeat: Callable[[], None], *, visible: bool) -> None:
        self._heartbeat = heartbeat
        self._visible = visible
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        self._heartbeat()
        now = time.monotonic()
        if self._visible and (done == total or now - self._shown > 0.2):
            self._shown = now
            end = "\n" if done == total else ""
            sys.stderr.write(f"\rloading weights: {done} of {total}{end}")
            sys.stderr.flush()


def _rank() -> int:
    return int(sys.argv[2])


if __name__ == "__main__":
    run_child(f"{RANK_PREFIX}{_rank()}", main)
