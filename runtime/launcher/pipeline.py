"""A whole engine: spawned, ready, watched, drained, stopped. `launch.py` and the offline `LLM` run the same one.

Names the processes' entry modules as strings (runtime/launcher/spawn.py) and imports none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import zmq

from vibe_sgl_lite.runtime.errors import StartupError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.launcher.diagnosis import Facts
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec, pipeline_children
from vibe_sgl_lite.runtime.launcher.spec import make_spec, threads_per_rank
from vibe_sgl_lite.runtime.launcher.watch import DRAIN_S, HEARTBEAT_LOST_S, Watch
from vibe_sgl_lite.runtime.messages import Weights
from vibe_sgl_lite.runtime.page_folder import FolderClaim
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints
from vibe_sgl_lite.runtime.transport.rundir import RunDir

RANK_SILENCE_STEPS = 4  # the scheduler's step watchdog comes first; this is for a rank that hangs while idle

log = logging.getLogger(__name__)


class Pipeline:
    """One engine's processes. Installs no signal handlers and prints nothing on stdout, so it runs inside any program.

    children: the processes to run (for tests). started: time.monotonic() from which start-up counts.
    on_progress: called with (children ready, children), from another thread.
    """

    def __init__(
        self,
        args: ServerArgs,
        *,
        children: Sequence[ChildSpec] | None = None,
        started: float | None = None,
        on_progress: Callable[[int, int], None] = lambda ready, of: None,
    ) -> None:
        self.args = args
        self.facts: dict[str, int | float | str] = {}
        self._children = pipeline_children(args) if children is None else children
        self._started = started
        self._on_progress = on_progress
        self._spec: PipelineSpec | None = None
        self._pool_tokens: int | None = None  # what the KV pool holds, once known
        self._watch: Watch | None = None
        self._pid = os.getpid()
        self._begun = False
        self._settled = threading.Event()  # ready, or ended
        self._ended = threading.Event()

    @property
    def address(self) -> str:
        """Where clients connect. Known once started."""
        return str(self.facts["address"])

    @property
    def tokenizer_folder(self) -> str:
        """Known once started."""
        assert self._spec is not None
        return self._spec.tokenizer_folder

    @property
    def failure(self) -> str | None:
        """Why the engine died, in one line; None while it lives, and after a stop that was asked for."""
        return None if self._watch is None else self._watch.failure

    def start(self) -> dict[str, int | float | str]:
        """Start everything and wait until it can serve.

        Returns facts: address, model, device, dtype, tp, kv_pages, page_size, context_length, startup (seconds), and
        http where it is served; on a node other than the first: node, ranks, startup.
        Raises UserError for what the user can fix before any process runs, StartupError when a child did not come up
        (then nothing is left running).
        """
        assert not self._begun, "a pipeline starts once"
        self._begun = True
        if self._started is None:
            self._started = time.monotonic()
        with contextlib.ExitStack() as cleanup:
            run = cleanup.enter_context(
                RunDir(self.args.name, self.args.address, encrypted=bool(self.args.client_keys))
            )
            if self.args.cache_dir is not None:
                cleanup.enter_context(FolderClaim(self.args.cache_dir))
            endpoints = Endpoints(directory=str(run.inner), api=run.address)
            self._spec = make_spec(self.args, endpoints)
            try:
                self._watch = self._make_watch(endpoints.control)
            except (OSError, zmq.ZMQError) as error:
                raise StartupError(f"{run.inner}: {error.strerror}", user=True) from error
            threading.Thread(
                target=self._keep, args=(self._watch, cleanup.pop_all()), name="pipeline", daemon=True
            ).start()
        atexit.register(self.stop, 0.0)
        try:
            self._settled.wait()
        except BaseException:  # Ctrl-C in a caller that has no handler of its own
            self.stop(0.0)
            raise
        if not self.facts:
            raise StartupError(self.failure or "stopped while starting", user=self._watch.users_mistake)
        return self.facts

    def request_stop(self, drain_s: float = DRAIN_S) -> bool:
        """Ask for a stop and return at once; safe in a signal handler. A second call hurries, and is over in 5 s.

        Returns whether there is something to stop: False before any process was started.
        """
        if self._watch is None or os.getpid() != self._pid:  # a fork of this process: the engine is its parent's
            return False
        self._watch.request_stop(drain_s)
        return True

    def stop(self, timeout: float = DRAIN_S) -> None:
        """Refuse new requests, let those that run finish for `timeout` seconds, abort the rest, end every process.

        Returns when all is gone, at most about 4 s after `timeout`. Safe to call twice and from any thread.
        """
        if self.request_stop(timeout):
            self._ended.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, for whatever reason. Returns whether it has come."""
        return self._ended.wait(timeout)

    def __enter__(self) -> Pipeline:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop(0.0)

    def _make_watch(self, control_address: str) -> Watch:
        restarts = 0 if self.args.restart == "never" else self.args.max_restarts
        return Watch(
            self._children,
            control_address=control_address,
            write_spec=self._write_spec,
            threads=threads_per_rank(self.args),
            rank_silence_s=HEARTBEAT_LOST_S + RANK_SILENCE_STEPS * self.args.step_timeout,
            hosts_only=self.args.node_rank > 0,
            max_restarts=restarts,
            rejoin_s=self.args.rejoin_timeout if self.args.nnodes > 1 else None,
            standby=restarts > 0 and not self.args.no_standby,
            on_ready=self._note_facts,
            on_progress=self._on_progress,
            keep_weights=self._set_weights,
        )

    def _set_weights(self, weights: Weights) -> None:
        assert self._spec is not None
        self._spec = msgspec.structs.replace(self._spec, new_weights=weights)

    def _write_spec(self, epoch: int) -> Path:
        """The spec file of processes that start now; those that start again find the pool as large as it was.

        Files of the epoch before, whose ranks are gone, are removed.
        """
        assert self._spec is not None
        for file in self._spec.endpoints.of_epoch(epoch - 1).rank_files(self.args.local_ranks):
            file.unlink(missing_ok=True)
        spec = msgspec.structs.replace(
            self._spec, endpoints=self._spec.endpoints.of_epoch(epoch), epoch=secrets.token_hex(8)
        )
        if self._pool_tokens is not None and self.args.nnodes == 1:  # else all nodes find it out together
            spec = msgspec.structs.replace(
                spec, args=msgspec.structs.replace(spec.args, max_total_tokens=self._pool_tokens)
            )
        file = Path(spec.endpoints.directory) / "spec.json"
        fresh = file.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_bytes(msgspec.json.encode(spec))
        return fresh.replace(file)  # at once: a child may be reading the one before

    def _keep(self, watch: Watch, cleanup: contextlib.ExitStack) -> None:
        """The watch's thread."""
        try:
            with cleanup:
                watch.run()
        finally:
            self._ended.set()
            self._settled.set()
            atexit.unregister(self.stop)

    def _note_facts(self, children: Mapping[str, Facts]) -> None:
        assert self._spec is not None
        assert self._started is not None
        found = {key: value for facts in children.values() for key, value in facts.items()}
        started = time.monotonic() - self._started
        if self.args.node_rank > 0:
            ranks = self.args.local_ranks
            self.facts = {"node": self.args.node_rank, "ranks": f"{ranks.start}-{ranks.stop - 1}", "startup": started}
            self._settled.set()
            return
        self._pool_tokens = int(found["kv_pages"]) * self._spec.page_size
        self.facts = {
            "address": found.get("address", self._spec.endpoints.api),  # port 0 was read back by who bound it
            "model": self._spec.model_name,
            "device": found.get("device", self._spec.device),
            "dtype": found.get("dtype", self._spec.dtype),
            "tp": self.args.tp,
            "kv_pages": found["kv_pages"],
            "page_size": self._spec.page_size,
            "context_length": self._spec.context_length,
            "startup": started,
        }
        if "http" in found:
            self.facts["http"] = found["http"]
        self._settled.set()
