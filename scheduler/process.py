"""The scheduler's process: moves messages between sockets and the core (scheduler/core.py), and watches the ranks.

One blocking loop: it sleeps in a poll until a request, a result or a command arrives, and never longer than the
heartbeat allows. Everything that is decided is decided in the core.

A step that takes far longer than it should means a rank hangs: the launcher is told, and no further step is sent. When
it says that the ranks are lost, their requests are back in the queue, and run again when the next ranks are ready.

    python -m vibe_sgl_lite.scheduler.process SPEC.json
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque

import msgspec
import zmq

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import Child, PipelineSpec, run_child
from vibe_sgl_lite.runtime.messages import (
    AbortRequest,
    AddRequest,
    ClientsLost,
    ErrorInfo,
    Message,
    NewScheduler,
    NewWeights,
    PagesMoved,
    RankDone,
    RankOutput,
    RankReady,
    RanksLost,
    SchedulerInput,
    SchedulerQuery,
    SchedulerReply,
    Shutdown,
    StepOutput,
    StepResult,
    StopMatched,
    StopRank,
    Weights,
    WeightsKept,
)
from vibe_sgl_lite.runtime.settings.step_sizes import step_sizes
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.control import Control
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.gathering import wait_s
from vibe_sgl_lite.scheduler.kv_events import KvEventPublisher, KvEvents
from vibe_sgl_lite.scheduler.observer import SchedulerObserver
from vibe_sgl_lite.scheduler.policies import make_policy
from vibe_sgl_lite.scheduler.results import Outputs
from vibe_sgl_lite.scheduler.status_line import StatusLine
from vibe_sgl_lite.scheduler.tiers.folder import CacheFolder
from vibe_sgl_lite.scheduler.tools.timeline import Timeline
from vibe_sgl_lite.scheduler.tools.trace import TraceWriter

POLL_MS = 250  # at most so long without a heartbeat
ESTIMATE_SLACK = 10.0  # a step may take so many times its estimate on top of the step timeout
MOST_INPUTS = 256  # messages a turn, so that a flood of requests does not hold up the ranks
AHEAD_S = {"cpu": 0.0, "cuda": 0.003}  # a step of one request is 0.7 ms on an H100, the way there and back as long
SMALLEST_CHUNK = {"cpu": 8, "cuda": 1024}  # tokens
FRESH_CHUNK = {"cpu": 8, "cuda": 8192}
FRESH_PROMPT = {"cpu": 4, "cuda": 2048}
BASE_TOKENS = {"cpu": 16.0, "cuda": 800.0}  # an empty step costs about as much as so many tokens
FLUSH_REFUSED = ErrorInfo("flush_refused", "flush_cache is refused while requests run or wait; try again when idle")

log = logging.getLogger(__name__)


def make_config(spec: PipelineSpec, ready: RankReady) -> SchedulerConfig:
    """The core's settings from the pipeline's, with what the ranks found."""
    args = spec.args
    device = "cuda" if ready.device.startswith("cuda") else "cpu"
    graph_rows = args.cuda_graph_max_bs or args.max_running_requests
    captures = device == "cuda" and not args.disable_cuda_graph
    return SchedulerConfig(
        num_pages=ready.kv_pages,
        page_size=spec.page_size,
        max_running_requests=args.max_running_requests,
        max_queued_requests=args.max_queued_requests,
        chunked_prefill_size=spec.chunked_prefill_size,
        smallest_chunk=SMALLEST_CHUNK[device],
        fresh_chunk=FRESH_CHUNK[device],
        fresh_prompt=FRESH_PROMPT[device],
        step_sizes=step_sizes(spec.chunked_prefill_size + graph_rows) if captures else (),
        max_step_stretch=args.max_step_stretch,
        policy=args.schedule_policy,
        radix_cache=not args.disable_radix_cache,
        overlap=not args.disable_overlap,
        ahead_s=AHEAD_S[device],
        fairness=args.fairness == "sessions",
        epoch=ready.epoch,
        weight_version=ready.weights.version,
        base_tokens=BASE_TOKENS[device],
        draft_tokens=args.draft_tokens,
    )


def make_core(config: SchedulerConfig, trace: str | None, profile: str | None) -> Scheduler:
    """The core, watched if a trace file or a folder for timelines is asked for. Raises ConfigError."""
    observers: list[SchedulerObserver] = []
    if trace is not None:
        observers.append(TraceWriter(trace, config))
    if profile is not None:
        observers.append(Timeline(profile))
    return Scheduler(config, observers)


class SchedulerProcess:
    """Sockets around a core. Construct, `wait_for_ranks`, `serve`, `stop_ranks`.

    epoch: of the rank group that lives, or that is to come.
    """

    def __init__(self, child: Child) -> None:
        self.child = child
        spec, context = child.spec, child.context
        make_policy(spec.args.schedule_policy)  # a wrong name fails now, not when the weights are loaded
        self.inputs: Receiver[SchedulerInput] = Receiver(context, spec.endpoints.scheduler, SchedulerInput)
        self.results: Receiver[RankOutput] = Receiver(context, spec.endpoints.results, RankOutput)
        self.detokenizer = Sender(context, spec.endpoints.detokenizer)
        self.detokenizer.send(NewScheduler())
        self.tokenizer_manager = Sender(context, spec.endpoints.tokenizer_manager)
        self.epoch = spec.endpoints.epoch
        self.ranks: list[Sender] = []
        self._connect_ranks()
        self._encoder = msgspec.msgpack.Encoder()
        self.kv_events: KvEventPublisher | None = None
        self.control: Control | None = None  # while it serves
        self._untold: list[Outputs] = []
        self._to_do: deque[SchedulerInput] = deque()  # inputs that are read but not yet acted on
        self._shutdown = False
        self._hung = False
        self._gathers = spec.device == "cpu"
        self._folder = CacheFolder(spec, child.heartbeat) if spec.args.cache_dir is not None else None
        self._last_result_at = 0.0

    # ----------------------------------------------------------------------------------------------------------- ranks

    def wait_for_ranks(self) -> RankReady | None:
        """Until rank 0 says how many pages there are; None when the launcher wants to stop before."""
        poller = self._poller(self.results.socket)
        while not self._shutdown:
            poller.poll(POLL_MS)
            self._launcher(None)
            for message in self.results.drain(most=1):
                self._lose_ranks(None, message.epoch)
                if message.epoch == self.epoch:
                    assert isinstance(message, RankReady), "a result before any step"
                    return message
        return None

    def stop_ranks(self) -> None:
        self.to_ranks(StopRank(self.epoch))

    def _connect_ranks(self) -> None:
        """To the group of `epoch`, there already or not; what the last one was still to get is thrown away."""
        for rank in self.ranks:
            rank.socket.close(linger=0)
        endpoints = self.child.spec.endpoints.of_epoch(self.epoch)
        self.ranks = [Sender(self.child.context, endpoints.rank(rank)) for rank in self.child.spec.args.local_ranks]

    def _lose_ranks(self, core: Scheduler | None, epoch: int) -> None:
        """Whoever says it first, the launcher or the new ranks: those of an older epoch than this are gone."""
        if epoch <= self.epoch:
            return
        self.epoch, self._hung = epoch, False
        self._connect_ranks()
        if core is not None:
            self._untold.append(core.lose_ranks(epoch, time.monotonic()))

    # ------------------------------------------------------------------------------------------------------------ loop

    def serve(self, core: Scheduler, weights: Weights) -> None:
        """Until the launcher says `Shutdown`. weights: of the ranks."""
        control = self.control = Control(core, self.child.spec, weights, self)
        replay = self.kv_events.replay if self.kv_events is not None else None
        poller = self._poller(self.inputs.socket, self.results.socket, *([] if replay is None else [replay]))
        status = StatusLine(core.stats, log.info, time.monotonic())
        while not self._shutdown:
            until_deadline_ms = max(0.0, core.next_deadline - time.monotonic()) * 1e3
            poller.poll(math.ceil(min(POLL_MS, until_deadline_ms)))
            outputs = self._untold
            self._take_results(core, control)
            self._launcher(core)
            if core.next_deadline <= time.monotonic():
                outputs.append(core.expire(time.monotonic()))
            self._take_inputs(core, control)
            outputs.append(control.advance(time.monotonic()))
            if not self._hung:
                self._send_steps(core)  # before the outputs: the ranks wait, clients hardly notice
                self._watch_ranks(core)
            self._tell_all()
            if self.kv_events is not None:
                self.kv_events.flush()
            status.look(time.monotonic())

    def tell_routers(self, core: Scheduler, address: str) -> None:
        """Publish what enters and leaves the prefix cache (--kv-events). Raises ConfigError."""
        args = self.child.spec.args
        events = KvEvents(self.child.spec.page_size)
        core.state.memory.cache.watchers.append(events)
        topic = f"kv@{args.host}:{args.port}@{args.served_model_name or self.child.spec.model_name}"
        try:
            self.kv_events = KvEventPublisher(self.child.context, address, args.kv_events_replay, topic, events)
        except zmq.ZMQError as error:
            where = address if args.kv_events_replay is None else f"{address} or {args.kv_events_replay}"
            raise ConfigError(f"--kv-events {where}: {error.strerror}; choose another", field="kv_events") from error

    def open_folder(self, core: Scheduler, ready: RankReady) -> None:
        """Ranks have come: with `--cache-dir`, they have what the folder has; with `--hicache-size`, empty memory."""
        if ready.host_slots:
            core.open_host(ready.host_slots, time.monotonic())
        contents = self._folder.contents(ready) if self._folder is not None else None
        if contents is not None:
            core.open_tier(contents, time.monotonic())

    def _launcher(self, core: Scheduler | None) -> None:
        """A heartbeat to the launcher, and what it commands. core: None before the first ranks are ready."""
        self.child.heartbeat()
        for command in self.child.commands():
            match command:
                case Shutdown():
                    self._shutdown = True
                case RanksLost(epoch=epoch):
                    self._lose_ranks(core, epoch)
                case WeightsKept(number=number) if self.control is not None:
                    self.control.on_kept(number, time.monotonic())
                case ClientsLost(before=before):
                    self._lose_clients(core, before)

    def _lose_clients(self, core: Scheduler | None, before: int) -> None:
        """Forget what the tokenizer manager that died has asked, and nothing of what its successor has."""
        while unread := self.inputs.drain():
            self._to_do += unread
        self._to_do = deque(message for message in self._to_do if not _is_older(message, before))
        if core is not None:
            self._untold += [core.abort(uid, time.monotonic()) for uid in core.client_requests if uid < before]

    def _take_results(self, core: Scheduler, control: Control) -> None:
        for message in self.results.drain():
            now = time.monotonic()
            self._lose_ranks(core, message.epoch)
            if isinstance(message, StepResult):
                self._last_result_at = now
                self._untold.append(core.complete(message, now))
            elif isinstance(message, PagesMoved):
                core.pages_moved(message, now)
                if message.error and self._folder is not None:
                    self._folder.cannot_store(message.error)
            elif message.epoch != self.epoch:
                pass  # last words
            elif isinstance(message, RankDone):
                control.on_done(message, now)
            elif control.on_ready(message, now):
                log.info(
                    "the ranks are back, with %d KV pages; %d requests go on",
                    message.kv_pages,
                    len(core.client_requests),
                )
                self._untold.append(core.ranks_ready(message.kv_pages, now))
                self.open_folder(core, message)

    def _take_inputs(self, core: Scheduler, control: Control) -> None:
        """What ends a request must not overtake the tokens it was just given.

        A flush that comes while the last step is still on its way back waits for it, and what comes later for both.
        """
        self._to_do += self.inputs.drain(most=MOST_INPUTS)
        if self._gathers and core.oldest_step is None:
            self._gather(core)
        while self._to_do:
            message = self._to_do.popleft()
            now = time.monotonic()
            match message:
                case AddRequest():
                    rejected = core.add(message, now)
                    if rejected is not None:
                        self.tokenizer_manager.send(rejected)
                case AbortRequest():
                    self._untold.append(core.abort(message.uid, now))
                case StopMatched():
                    core.stop_matched(message.uid, now)
                case SchedulerQuery(what="flush_cache") if core.winding_down:
                    self._to_do.appendleft(message)
                    return
                case SchedulerQuery(what="stats" | "flush_cache" | "watch"):
                    self.tokenizer_manager.send(self._answer(core, message, control.sleep_level))
                case SchedulerQuery():
                    self._untold.append(control.take(message, now))

    def _gather(self, core: Scheduler) -> None:
        """Wait for the company of the requests that have come."""
        began, room = time.monotonic(), core.config.chunked_prefill_size
        while tokens := sum(len(message.token_ids) // 4 for message in self._to_do if isinstance(message, AddRequest)):
            left_s = wait_s(core.cost, tokens, room, time.monotonic() - began)
            if not left_s or not self.inputs.socket.poll(math.ceil(left_s * 1e3)):
                return
            self._to_do += self.inputs.drain(most=MOST_INPUTS)

    def _send_steps(self, core: Scheduler) -> None:
        while True:
            batch = core.schedule(time.monotonic())
            moves = core.moves(time.monotonic()) if core.has_moves(time.monotonic()) else []
            for message in (*moves, *([] if batch is None else [batch])):
                frame = self._encoder.encode(message)
                for rank in self.ranks:
                    rank.send_bytes(frame)
            if batch is None:
                return

    def to_ranks(self, message: Message) -> None:
        for rank in self.ranks:
            rank.send(message)

    def to_launcher(self, weights: Weights) -> None:
        self.child.keep_weights(weights, self.epoch)

    def reply(self, reply: SchedulerReply) -> None:
        self.tokenizer_manager.send(reply)

    def new_weights(self, version: str) -> None:
        self._tell_all()
        self.detokenizer.send(NewWeights(version))

    def _tell_all(self) -> None:
        for outputs in self._untold:
            self._tell(outputs)
        self._untold.clear()

    def _tell(self, outputs: Outputs) -> None:
        for opened in outputs.opens:
            self.detokenizer.send(opened)
        if outputs:
            self.detokenizer.send(StepOutput(outputs.tokens, outputs.next_tokens))

    @staticmethod
    def _answer(core: Scheduler, query: SchedulerQuery, sleep_level: int) -> SchedulerReply:
        if query.what == "stats":
            return SchedulerReply(query.qid, core.stats() | {"sleep_level": sleep_level})
        if query.what == "watch":
            return SchedulerReply(query.qid, {"snapshot": msgspec.json.encode(core.snapshot()).decode()})
        freed = core.flush_cache(time.monotonic())
        if freed is None:
            return SchedulerReply(query.qid, {}, error=FLUSH_REFUSED)
        return SchedulerReply(query.qid, {"flushed_pages": freed})

    # -------------------------------------------------------------------------------------------------------- watching

    def _watch_ranks(self, core: Scheduler) -> None:
        step = core.oldest_step
        if step is None:
            return
        running_s = time.monotonic() - max(step.sent_at, self._last_result_at)
        allowed_s = self.child.spec.args.step_timeout + ESTIMATE_SLACK * step.estimate_s
        if running_s > allowed_s:
            self._hung = True
            self.child.failed(
                f"step {step.number} ({step.num_rows} rows, {step.work.tokens} tokens) has no result after "
                f"{running_s:.1f} s; {allowed_s:.1f} s were allowed (--step-timeout)",
                culprit="model_worker.0",
            )

    def _poller(self, *sockets: zmq.Socket[bytes]) -> zmq.Poller:
        poller = zmq.Poller()
        for socket in (*sockets, self.child.control):
            poller.register(socket, zmq.POLLIN)
        return poller


def _is_older(message: SchedulerInput, before: int) -> bool:
    """Whether it asks for something under a smaller number. 0 is the tokenizer manager's own question, any one's."""
    number = message.uid if isinstance(message, AddRequest) else 0
    if isinstance(message, SchedulerQuery):
        number = message.qid
    return 0 < number < before


def main(child: Child) -> None:
    process = SchedulerProcess(child)
    ready = process.wait_for_ranks()
    if ready is not None:
        tokens, context = ready.kv_pages * child.spec.page_size, child.spec.context_length
        log.info("%d KV pages of %d tokens on %s", ready.kv_pages, child.spec.page_size, ready.device)
        if tokens < context:
            log.info(
                "the KV cache holds %d tokens, the context has %d: a request may have as many as the cache holds "
                "(--max-total-tokens and --mem-fraction-static make it larger)", tokens, context
            )  # fmt: skip
        args = child.spec.args
        core = make_core(make_config(child.spec, ready), args.trace, args.profile)
        process.open_folder(core, ready)
        if args.kv_events is not None:
            process.tell_routers(core, args.kv_events)
        child.ready(kv_pages=ready.kv_pages, device=ready.device, dtype=ready.dtype, page_size=child.spec.page_size)
        try:
            process.serve(core, ready.weights)
        finally:
            core.close()
    process.stop_ranks()


if __name__ == "__main__":
    run_child("scheduler", main)
