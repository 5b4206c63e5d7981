"""The watch over a pipeline's processes, from the first spawn to the last reaped: one thread, one state machine.

    spawn -> wait until all are ready -> serve -> drain -> shut down -> killed and reaped
               a death at the start, or too many later -> every request is told -> killed and reaped

While serving, an unexpected exit, a failure or silence of a child ends its group (supervisor.py says who that is),
which is started again; the others are told what was lost with it, and requests go on from the tokens they have.

On a node that only hosts ranks there is nobody to drain, and the ranks end it: they exit with 0 when node 0 stops.

Children are spawned by the thread that runs `Watch.run`, which lives as long as they do: PR_SET_PDEATHSIG follows the
thread that forked, so a caller's thread that ends would take the engine with it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vibe_sgl_lite.runtime.errors import EngineDeadError, EngineLostError
from vibe_sgl_lite.runtime.launcher.control import ControlLine
from vibe_sgl_lite.runtime.launcher.diagnosis import Facts, WatchedChild, end_hung, in_trouble, likeliest_cause
from vibe_sgl_lite.runtime.launcher.spawn import REAP_S, ChildProcess, ChildSpec
from vibe_sgl_lite.runtime.launcher.standby import Standby
from vibe_sgl_lite.runtime.launcher.supervisor import WINDOW_S, Supervisor
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.messages import (
    AbortAll,
    ChildFailed,
    ChildReady,
    ClientsLost,
    Drain,
    Drained,
    EngineLost,
    ErrorInfo,
    KeepWeights,
    LauncherMessage,
    RanksLost,
    Shutdown,
    Weights,
    WeightsKept,
    numbers_from_now,
)

POLL_S = 0.05  # an exit is noticed after this long at most, plus SETTLE_S
SETTLE_S = 0.05  # after the first sign of trouble: let its other signs come in, to name the cause and not a consequence
HEARTBEAT_LOST_S = 15.0
OWN_PAUSE_S = 2.0  # between two checks; longer means that the launcher itself did not run (Ctrl-Z, a debugger)
STILL_STARTING_S = 10.0  # between two words on who is awaited
STARTUP_LIMIT_S = 3600.0  # large models on slow disks; beyond this something hangs
DRAIN_S = 30.0  # what running requests get after a stop was asked for
HURRY_S = 1.5  # what is left of that after a second signal: all is over within 5 s of it
TELL_S = 1.0  # for the tokenizer manager to send every client its terminal event
EXIT_S = 2.0  # from Shutdown to SIGKILL
TOKENIZER_MANAGER, SCHEDULER, DETOKENIZER = "tokenizer_manager", "scheduler", "detokenizer"

log = logging.getLogger(__name__)


class _Failed(Exception):
    """The pipeline cannot go on as it is; the text names process and cause, `names` whom to start again."""

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names


class _Final(_Failed):
    """Nor can it by starting anything again."""


class _Stopped(Exception):
    """Asked to stop before all children were ready."""


class Watch:
    """Runs the children of one pipeline. `run` blocks to the end; `request_stop` may be called from any thread and from
    a signal handler. After `run`, `failure` is None or the cause of death in one line.

    write_spec: makes the children's spec file; its argument is the rank group's epoch, counted from 0. hosts_only: the
    children are ranks of an engine whose other processes are on another node. on_ready: called with each child's facts
    once all are ready. rank_silence_s: how long a rank may be busy in one step without a heartbeat. max_restarts: of a
    child within WINDOW_S; 0 never restarts. standby: keep spare processes for the ranks. rejoin_s: how long ranks that
    start again may wait for those of other nodes; None where there are none. keep_weights: told which weights are in
    force from now on, for the spec file.
    """

    def __init__(
        self,
        children: Sequence[ChildSpec],
        *,
        control_address: str,
        write_spec: Callable[[int], Path],
        threads: int,
        rank_silence_s: float,
        hosts_only: bool,
        max_restarts: int,
        rejoin_s: float | None,
        standby: bool,
        on_ready: Callable[[Mapping[str, Facts]], None],
        on_progress: Callable[[int, int], None],
        keep_weights: Callable[[Weights], None],
    ) -> None:
        self.failure: str | None = None
        self.users_mistake = False  # whether the failure is one that the user can fix
        self._specs = {spec.name: spec for spec in children}
        self._write_spec = write_spec
        self._rejoin_s = rejoin_s
        self._supervisor = Supervisor(children, max_restarts)
        self._max_restarts = max_restarts
        self._epoch = 0  # of the rank group
        self._recovering: tuple[str, float] | None = None  # why and since when
        self._threads = threads
        self._spared = [spec for spec in children if spec.is_rank] if standby else []
        self._standby: Standby | None = None  # while it serves
        self._rank_silence_s = rank_silence_s
        self._hosts_only = hosts_only
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._keep_weights = keep_weights
        self._control = ControlLine(control_address)
        self._children: dict[str, WatchedChild] = {}
        self._drained = False
        self._hung: tuple[str, str] | None = None  # a child and why
        self._checked_at = time.monotonic()
        self._stop_at: float | None = None  # end of the drain; None while nobody asked to stop

    def request_stop(self, drain_s: float) -> None:
        """Stop within `drain_s` seconds plus about 3. A later call can only hurry: the earlier deadline holds."""
        deadline = time.monotonic() + drain_s
        if self._stop_at is None or deadline < self._stop_at:
            self._stop_at = deadline
        self._control.wake()

    def run(self) -> None:
        life_read, life_write = self._life = os.pipe()
        try:
            self._spawn(list(self._specs))
            self._wait_until_ready()
            self._on_ready({name: child.facts or {} for name, child in self._children.items()})
            self._serve()
            self._drain()
            self._shut_down()
        except _Stopped:
            pass
        except _Failed as failure:
            self.failure = str(failure)
            log.error("%s", self.failure)
            self._tell_clients()
        except OSError as error:  # a full disk, too many processes or files
            self.failure, self.users_mistake = f"launcher: {one_line(error)}", True
            log.error("%s", self.failure)
            self._tell_clients()
        except Exception as error:
            log.exception("the launcher failed")
            self.failure = f"launcher failed: {type(error).__name__}: {one_line(error)}"
        finally:
            self._end(list(self._children))
            if self._standby is not None:
                self._standby.close()
            os.close(life_read)
            os.close(life_write)
            self._control.close()

    def _spawn(self, names: Sequence[str]) -> None:
        spec_file = self._write_spec(self._epoch)
        for name in names:
            process = None if self._standby is None else self._standby.take(name)
            if process is None:
                process = ChildProcess(self._specs[name], spec_file, self._threads, self._life[0])
            else:
                process.start(spec_file)
            self._children[name] = WatchedChild(process, time.monotonic())

    def _end(self, names: Sequence[str]) -> None:
        """Kill and reap."""
        ended = [self._children.pop(name) for name in names if name in self._children]
        for child in ended:
            child.process.kill()
        deadline = time.monotonic() + REAP_S
        for child in ended:
            if not child.process.reap(deadline - time.monotonic()):
                log.warning("%s was killed %.0f s ago and has not ended yet", child.process.name, REAP_S)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_LIMIT_S
        shown, tell_at = -1, time.monotonic() + STILL_STARTING_S
        while True:
            ready = sum(child.facts is not None for child in self._children.values())
            if ready != shown:
                self._on_progress(ready, len(self._children))
                shown = ready
            if self._supervisor.all_running:
                return
            if self._stop_at is not None:
                raise _Stopped
            silent = ", ".join(name for name, child in self._children.items() if child.facts is None)
            if time.monotonic() > deadline:
                raise _Failed(f"{silent} not ready after {STARTUP_LIMIT_S:.0f} s")
            if time.monotonic() > tell_at:
                tell_at += STILL_STARTING_S
                log.info("still starting: %s", silent)
            self._turn(POLL_S)
            self._check_exits()

    def _serve(self) -> None:
        for child in self._children.values():
            child.last_seen = time.monotonic()  # heartbeats are owed from now on
        self._standby = Standby(self._spared, self._threads, self._life[0])
        while self._stop_at is None:
            self._turn(POLL_S)
            self._supervise()
            if self._supervisor.all_running:
                self._standby.keep()
            if self._hosts_only and all(child.process.exit_code() == 0 for child in self._children.values()):
                self.request_stop(0.0)

    def _supervise(self) -> None:
        """Start again what has died, within limits. Raises _Failed beyond them."""
        try:
            self._check_exits()
            self._check_heartbeats()
        except _Final:
            raise
        except _Failed as failure:
            self._recover(failure)
        due = self._supervisor.due(time.monotonic())
        try:
            if due:
                self._spawn(due)
        except OSError as error:  # a full disk, too many processes or files: it may pass
            self.users_mistake = True
            self._restart(due, _Failed(f"launcher: {one_line(error)}"))
        if self._recovering is not None and self._supervisor.all_running:
            why, since = self._recovering
            self._recovering = None
            log.warning("serving again %.1f s after: %s", time.monotonic() - since, why)

    def _recover(self, failure: _Failed) -> None:
        """Restart whatever is gone."""
        gone = [
            name
            for name, child in self._children.items()
            if child.process.exit_code() is not None or child.failed is not None or name in failure.names
        ]
        if gone:  # else somebody accused a child that is starting again already
            self._restart(gone, failure)

    def _restart(self, gone: Sequence[str], failure: _Failed) -> None:
        """End the groups of these and tell the others what they lost. Raises _Failed when enough has been tried."""
        now = time.monotonic()
        ended = self._supervisor.died(gone, now)
        if ended is None:
            if self._max_restarts and not self.users_mistake:
                raise _Failed(f"{failure}; given up after {self._max_restarts} restarts in {WINDOW_S:.0f} s")
            raise failure
        log.warning("%s; restarting %s", failure, ", ".join(ended))
        self._recovering = (str(failure), now if self._recovering is None else self._recovering[1])
        self._end(ended)
        self._turn(0)  # their last words are not their successors'
        if self._hung is not None and self._hung[0] in ended:
            self._hung = None  # nor is what somebody has said of them
        if any(self._specs[name].is_rank for name in ended):
            self._epoch += 1
            self._send(SCHEDULER, RanksLost(self._epoch))
        if SCHEDULER in ended or DETOKENIZER in ended:
            error = ErrorInfo(EngineLostError.code, f"{failure}; the engine restarts")
            self._send(TOKENIZER_MANAGER, EngineLost(error, scheduler=SCHEDULER in ended))
        if TOKENIZER_MANAGER in ended:
            self._send(SCHEDULER, ClientsLost(numbers_from_now()))

    def _drain(self) -> None:
        """No new requests; wait for those that run, then abort the rest."""
        assert self._stop_at is not None
        if self._hosts_only:
            return
        told: WatchedChild | None = None
        while not self._drained and time.monotonic() < self._stop_at:
            manager = self._children.get(TOKENIZER_MANAGER)
            if manager is not told and self._send(TOKENIZER_MANAGER, Drain()):
                told = manager  # one that starts again meanwhile knows of no drain
            self._turn(min(POLL_S, self._stop_at - time.monotonic()))
            self._supervise()
        if not self._drained:
            if told is not None:
                log.warning("the drain's time is up, aborting what still runs")
            self._abort_all(None)

    def _shut_down(self) -> None:
        for name in self._children:
            self._send(name, Shutdown())
        deadline = time.monotonic() + EXIT_S
        while time.monotonic() < deadline:
            self._turn(POLL_S)
            if all(child.process.exit_code() is not None for child in self._children.values()):
                return
        late = [name for name, child in self._children.items() if child.process.exit_code() is None]
        log.warning("killing %s: still there %.0f s after being asked to leave", ", ".join(late), EXIT_S)

    def _tell_clients(self) -> None:
        """Before the end: let a living tokenizer manager end every request as `engine_dead`."""
        manager = self._children.get(TOKENIZER_MANAGER)
        if manager is not None and manager.process.exit_code() is None and manager.facts is not None:
            self._drained = False
            self._abort_all(ErrorInfo(EngineDeadError.code, f"the engine died: {self.failure}"))

    def _abort_all(self, error: ErrorInfo | None) -> None:
        if not self._send(TOKENIZER_MANAGER, AbortAll(error=error)):
            return
        manager = self._children[TOKENIZER_MANAGER].process
        deadline = time.monotonic() + TELL_S
        while not self._drained and time.monotonic() < deadline and manager.exit_code() is None:
            self._turn(POLL_S)

    def _send(self, name: str, message: LauncherMessage) -> bool:
        return name in self._children and self._control.send(name, message)

    def _turn(self, timeout_s: float) -> None:
        """Take in what the children say, waiting at most `timeout_s` for it."""
        for message in self._control.receive(timeout_s):
            child = self._children.get(message.name)
            if child is None or message.pid != child.process.pid:
                log.debug("a late message of a former %s: %s", message.name, message)
                continue
            child.last_seen = time.monotonic()
            match message:
                case ChildReady(facts=facts):
                    child.facts = facts
                    self._supervisor.ready(message.name)
                    child.last_seen = time.monotonic()  # heartbeats are owed from now on
                    log.debug("%s is ready: %s", message.name, facts)
                case Drained():
                    self._drained = True
                case KeepWeights(weights=weights, epoch=epoch):
                    if epoch == self._epoch:
                        self._keep_weights(weights)
                        self._send(SCHEDULER, WeightsKept(weights.number))
                case ChildFailed(culprit=culprit):
                    if culprit is None:
                        child.failed = child.failed or message
                        child.failed_at = time.monotonic()
                    elif self._hung is None:
                        self._hung = (culprit, message.message)

    def _check_exits(self) -> None:
        """Raises _Failed when a child is gone, has said that it failed and stays, or hangs as another one says."""
        if self._hung is not None:
            self._end_hung(*self._hung)
        children = self._children.values()
        if not in_trouble(children, may_leave=self._hosts_only):
            return
        deadline = time.monotonic() + SETTLE_S
        while (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        cause = likeliest_cause(children)
        self.users_mistake = cause.users_mistake
        raise _Failed(cause.text, cause.name)

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        if now - self._checked_at > OWN_PAUSE_S:  # what children sent meanwhile is still on its way
            for child in self._children.values():
                child.last_seen = now
        self._checked_at = now
        for child in self._children.values():
            if child.facts is None:  # still starting: it may be reading weights
                rejoins = child.process.spec.is_rank and self._epoch > 0 and self._rejoin_s is not None
                if rejoins and now - child.started > (self._rejoin_s or 0.0):
                    raise _Final(f"the ranks of all nodes did not meet again in {self._rejoin_s:g} s, --rejoin-timeout")
                if now - child.started > STARTUP_LIMIT_S:
                    self._end_hung(child.process.name, f"not ready after {STARTUP_LIMIT_S:.0f} s")
                continue
            limit = self._rank_silence_s if child.process.spec.is_rank else HEARTBEAT_LOST_S
            if now - child.last_seen > limit:
                self._end_hung(child.process.name, f"no heartbeat for {limit:.0f} s")

    def _end_hung(self, name: str, why: str) -> None:
        """Raises _Failed."""
        cause = end_hung(self._children, name, why)
        self._hung = None
        raise _Failed(cause.text, cause.name)
