"""The tokenizer manager process: `python -m vibe_sgl_lite.tokenizer_manager.process <spec file>`.

One event loop (uvloop where there is one) over plain ZeroMQ sockets. A ZeroMQ socket's file descriptor tells only of
changes, and any call on the socket may take such a change in; so every wake-up goes round all sockets until a whole
round finds nothing, and a timer goes round besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import zmq

from vibe_sgl_lite.runtime.chrome_trace import TOKENIZER_MANAGER, ChromeTrace
from vibe_sgl_lite.runtime.launcher.child import Child, run_child
from vibe_sgl_lite.runtime.messages import AbortAll, Drain, EngineLost, Finish, SchedulerInput, Shutdown, TokenizerInput
from vibe_sgl_lite.runtime.settings.machine import raise_descriptor_limit
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.transport.channels import Receiver, new_socket
from vibe_sgl_lite.runtime.transport.curve import AllowList, read_keys
from vibe_sgl_lite.tokenizer_manager.connections import ConnectionLimit
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import CompilerArgs, GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.manager import THREADS, TokenizerManager
from vibe_sgl_lite.tokenizer_manager.sessions import ClientSocket, Sessions
from vibe_sgl_lite.tokenizer_manager.validate import Limits, Prepared, check_tokenizer

FRAMES_AT_ONCE = 256  # of one socket, before the others have their turn
TICK_S = 0.25
RETRY_S = 0.02  # while a client or the scheduler does not take what is there for it
GOODBYE_S = 0.3
READ_S = 0.005  # for clients' frames, before the others have their turn

log = logging.getLogger(__name__)


class SchedulerLine:
    """The PUSH socket to the scheduler, behind a queue: the loop must not block while it also serves the way back."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = new_socket(context, zmq.PUSH)
        self.socket.connect(address)
        self._waiting: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, message: SchedulerInput) -> None:
        self._waiting.append(self._encoder.encode(message))
        self.flush()

    def flush(self) -> None:
        while self._waiting:
            try:
                self.socket.send(self._waiting[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._waiting.popleft()


class Service:
    """The sockets and the loop around a `TokenizerManager`."""

    def __init__(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        spec = child.spec
        endpoints = spec.endpoints
        tokenizer = ChatTokenizer.from_folder(spec.tokenizer_folder)
        check_tokenizer(tokenizer, spec)
        if not Path(endpoints.tokenizer_file).exists():  # by a predecessor
            tokenizer.write_json(Path(endpoints.tokenizer_file))
        self._child = child
        self._loop = loop
        self._inbound: Receiver[TokenizerInput] = Receiver(child.context, endpoints.tokenizer_manager, TokenizerInput)
        self._scheduler = SchedulerLine(child.context, endpoints.scheduler)
        addresses = dict.fromkeys((endpoints.inner_api, endpoints.api))
        self._allowed: AllowList | None = None
        self._clients = ClientSocket(
            child.context, Limits.of(spec.context_length).frame_bytes, *addresses, guard=self._guard
        )
        self._connections = ConnectionLimit(self._clients.socket, raise_descriptor_limit())
        self._sessions = Sessions(self._clients, loop.time())
        self._executor = ThreadPoolExecutor(THREADS, "tokenize")
        self._grammars = GrammarCompiler(
            CompilerArgs(endpoints.tokenizer_file, spec.model.vocab_size, spec.model.eos_token_ids)
        )
        self._manager = TokenizerManager(
            spec, tokenizer, self._grammars, self._sessions, self._in_thread, self._scheduler.send, loop.time
        )
        profile = spec.args.profile
        self._trace = ChromeTrace(profile, "tokenizer_manager", (TOKENIZER_MANAGER,)) if profile is not None else None
        self._ended: asyncio.Future[None] = loop.create_future()
        self._round_due = False
        self._read_up_to = loop.time()  # when there was last nothing from clients left to read
        self._bad_frames_logged = 0
        # The launcher first, then what frees memory, then what takes it.
        self._drains: list[tuple[zmq.Socket[bytes], Callable[[], None]]] = [
            (child.control, self._read_launcher),
            (self._connections.events, self._connections.check),
            (self._inbound.socket, self._read_engine),
            (self._clients.socket, self._read_clients),
        ]
        if self._allowed is not None:
            self._drains.insert(1, (self._allowed.socket, self._allowed.answer))

    def _guard(self, socket: zmq.Socket[bytes]) -> None:
        """Raises ConfigError."""
        args = self._child.spec.args
        if args.server_key is not None and args.client_keys is not None:
            self._allowed = AllowList(self._child.context, args.client_keys)
            self._allowed.serve(socket, read_keys(args.server_key, "--server-key"))

    async def run(self) -> None:
        """Returns after `Shutdown`."""
        for socket, _ in self._drains:
            self._loop.add_reader(socket.FD, self._wake)
        self._child.ready(address=self._clients.address)
        self._tick()
        try:
            await self._ended
        finally:
            for socket, _ in self._drains:
                self._loop.remove_reader(socket.FD)
        await self._say_goodbye()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._trace is not None:
            self._trace.close()
        self._connections.close()
        self._clients.close()
        if self._allowed is not None:
            self._allowed.close()
        self._inbound.close()
        self._scheduler.socket.close()

    def _wake(self) -> None:
        if not self._round_due:
            self._round_due = True
            self._loop.call_soon(self._guarded, self._round)

    def _round(self) -> None:
        self._round_due = False
        self._child.heartbeat()
        for socket, drain in self._drains:
            if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._wake()
                drain()
            elif socket is self._clients.socket:
                self._read_up_to = self._loop.time()
        if self._manager.take_drained():
            self._child.drained()

    def _tick(self) -> None:
        if self._ended.done():
            return
        self._guarded(self._on_tick)
        lagging = len(self._scheduler) or self._sessions.num_lagging
        self._loop.call_later(RETRY_S if lagging else TICK_S, self._tick)

    def _on_tick(self) -> None:
        self._round()
        self._scheduler.flush()
        self._manager.tick(self._read_up_to)
        if self._manager.counters.bad_frames > 2 * self._bad_frames_logged:  # a flood of them must not fill a disk
            self._bad_frames_logged = self._manager.counters.bad_frames
            log.warning("%d unreadable frames from clients so far", self._bad_frames_logged)
        self._wake()  # what was sent just now may have taken in a change

    def _guarded(self, step: Callable[[], None]) -> None:
        """The loop would only log an exception: our own mistakes must end the process."""
        if self._ended.done():
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 - `run` raises it
            if not self._ended.done():
                self._ended.set_exception(error)

    def _read_launcher(self) -> None:
        for command in self._child.commands():
            match command:
                case Drain():
                    self._manager.drain()
                case AbortAll(error=error):
                    self._manager.abort_all(error)
                case EngineLost(error=error, scheduler=scheduler):
                    if scheduler:
                        self._manager.lose_scheduler(error)
                    log.info(
                        "%d requests are lost with a process; clients send them again", len(self._manager.requests)
                    )
                    self._manager.end_all(Finish("error", error=error))
                case Shutdown():
                    self._ended.set_result(None)
                    return

    def _read_engine(self) -> None:
        began, messages = time.monotonic(), self._inbound.drain(FRAMES_AT_ONCE)
        for message in messages:
            self._manager.on_engine(message)
        self._span("to clients", began, messages=len(messages))

    def _read_clients(self) -> None:
        began, count = time.monotonic(), 0
        for identity, frame in self._clients.receive(FRAMES_AT_ONCE):
            self._manager.on_frame(identity, frame)
            count += 1
            if time.monotonic() - began > READ_S:
                break
        self._span("from clients", began, frames=count)

    def _span(self, name: str, began: float, **counts: int) -> None:
        """For --profile."""
        if self._trace is not None:
            self._trace.span(TOKENIZER_MANAGER, name, began, time.monotonic() - began, counts)

    def _in_thread(self, work: Callable[[], Prepared], done: Callable[[Future[Prepared]], None]) -> None:
        def finish(future: Future[Prepared]) -> None:
            self._guarded(partial(done, future))
            self._wake()

        def tell(future: Future[Prepared]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                self._loop.call_soon_threadsafe(finish, future)

        def timed() -> Prepared:
            began = time.monotonic()
            try:
                return work()
            finally:
                self._span("prepare a prompt", began)

        self._executor.submit(timed if self._trace is not None else work).add_done_callback(tell)

    async def _say_goodbye(self) -> None:
        self._manager.say_goodbye()
        deadline = self._loop.time() + GOODBYE_S
        while self._sessions.num_lagging and self._loop.time() < deadline:
            self._sessions.flush()
            await asyncio.sleep(RETRY_S)


async def serve(child: Child) -> None:
    await Service(child, asyncio.get_running_loop()).run()


def main(child: Child) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are the ranks'
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve(child))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for this platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


if __name__ == "__main__":
    run_child("tokenizer_manager", main)
