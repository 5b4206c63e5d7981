"""What every child process of the pipeline shares: its spec, its line to the launcher, and dying with its parent.

The launcher starts a child through `runtime/launcher/boot.py`. A child's entry module ends in

    if __name__ == "__main__":
        run_child("scheduler", main)          # main(child: Child) -> None

`run_child` reads the spec file named on the command line and turns an exception into one `ChildFailed` message and a
non-zero exit. `main` returns when `Child.commands` brings a `Shutdown`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from vibe_sgl_lite.runtime.errors import UserError
from vibe_sgl_lite.runtime.launcher.boot import prepare_child
from vibe_sgl_lite.runtime.logs import setup_logging
from vibe_sgl_lite.runtime.messages import (
    ChildFailed,
    ChildMessage,
    ChildReady,
    Drained,
    Heartbeat,
    KeepWeights,
    LauncherMessage,
    Weights,
)
from vibe_sgl_lite.runtime.settings.machine import available_memory, trim_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

HEARTBEAT_S = 0.5
FAIL_AT_ONCE_S = 0.2

log = logging.getLogger(__name__)


class PipelineSpec(msgspec.Struct, frozen=True):
    """All that a child needs to start, written by the launcher as JSON into the private directory.

    model_folder: resolved local folder. context_length, chunked_prefill_size, page_size, device, dtype: resolved
    from "auto". epoch: random, one per start of the pipeline. new_weights: what took the place of the folder's since.
    """

    args: ServerArgs
    endpoints: Endpoints
    model: ModelConfig
    model_name: str
    model_folder: str
    tokenizer_folder: str
    context_length: int
    chunked_prefill_size: int
    page_size: int
    device: str
    dtype: str
    epoch: str
    new_weights: Weights | None = None

    @property
    def weights(self) -> Weights:
        """Those in force when this was written."""
        folder = "" if self.args.load_format == "dummy" else self.model_folder
        return self.new_weights or Weights(folder, self.args.weight_version)


class Child:
    """One child's context: spec, ZeroMQ context, the control line to the launcher. For the main thread only, but
    for `fail_at_once`."""

    def __init__(self, name: str, spec: PipelineSpec, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.name = name
        self.spec = spec
        self.context = context
        self.control = context.socket(zmq.DEALER)
        self.control.setsockopt(zmq.IDENTITY, name.encode())
        self.control.setsockopt(zmq.LINGER, 500)
        self.control.connect(spec.endpoints.control)
        self._decoder: msgspec.msgpack.Decoder[LauncherMessage] = msgspec.msgpack.Decoder(LauncherMessage)
        self._last_beat = 0.0
        self.is_ready = False
        self._pid = os.getpid()

    def _send(self, message: ChildMessage) -> None:
        self.control.send(msgspec.msgpack.encode(message))

    def ready(self, **facts: int | float | str) -> None:
        gc.freeze()  # what is there now stays: no collection has to look at it again
        trim_memory()
        self.is_ready = True
        self._send(ChildReady(self.name, facts, self._pid))

    def drained(self) -> None:
        self._send(Drained(self.name, self._pid))

    def failed(self, message: str, *, user: bool = False, culprit: str | None = None) -> None:
        self._send(ChildFailed(self.name, message, user, culprit, self._pid))

    def fail_at_once(self, message: str) -> None:
        """For another thread, when the main one may be stuck in native code: say why, and end the process."""
        log.error("%s", message)
        control = self.context.socket(zmq.DEALER)
        control.setsockopt(zmq.IDENTITY, self.name.encode())  # it takes the main one's place
        control.connect(self.spec.endpoints.control)
        control.send(msgspec.msgpack.encode(ChildFailed(self.name, message, False, None, self._pid)))
        time.sleep(FAIL_AT_ONCE_S)  # ZeroMQ's own thread sends it
        os._exit(1)

    def keep_weights(self, weights: Weights, rank_epoch: int) -> None:
        self._send(KeepWeights(self.name, weights, rank_epoch, self._pid))

    def heartbeat(self) -> None:
        """Call once per turn of the work loop; sends at most one message every HEARTBEAT_S seconds."""
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_S:
            self._last_beat = now
            self._send(Heartbeat(self.name, self._pid))

    def commands(self) -> list[LauncherMessage]:
        """Commands waiting on `control`, without blocking. Poll `control` (it is a ZeroMQ socket) beside your own."""
        messages: list[LauncherMessage] = []
        while True:
            try:
                frame = self.control.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(self._decoder.decode(frame))


def _lacks_memory(error: Exception) -> bool:
    """torch, Python's threads and C++ say it in words alone."""
    words = ("memory", "can't start new thread", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _lacks_resources(error: Exception) -> bool:
    """Whether the machine would not give what was needed: memory, disk, processes, files."""
    if isinstance(error, RuntimeError) and _lacks_memory(error):
        return True
    return isinstance(error, OSError | MemoryError | ImportError | zmq.ZMQError)


def run_child(name: str, main: Callable[[Child], None]) -> None:
    """Run one child process to its end; never returns. Exit code 0 after a normal return of `main`, else 1."""
    prepare_child()
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=PipelineSpec)
    setup_logging(name, spec.args.log_level)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    child = Child(name, spec, context)
    code = 0
    try:
        main(child)
    except UserError as error:
        child.failed(str(error), user=True)
        code = 1
    except Exception as error:
        lacking = not child.is_ready and _lacks_resources(error)  # one line then, no traceback: it is not our mistake
        log.log(logging.DEBUG if lacking else logging.ERROR, "%s failed", name, exc_info=True)
        limit = f" (memory is limited by {available_memory().source})" if lacking and _lacks_memory(error) else ""
        child.failed(f"{type(error).__name__}: {error}{limit}", user=lacking)
        code = 1
    child.control.close()
    context.destroy(linger=500)
    sys.stderr.flush()
    os._exit(code)  # no interpreter teardown: worker threads of native libraries must not delay or crash the exit
