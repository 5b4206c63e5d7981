"""Launcher <-> children: ready, heartbeats, failures, draining and the end."""

from __future__ import annotations

from vibe_sgl_lite.runtime.messages.base import Message
from vibe_sgl_lite.runtime.messages.parts import ErrorInfo, Weights


class ChildReady(Message, frozen=True):
    """A child can do its work. `facts`: what it found at run time (the scheduler tells kv_pages, device, dtype).

    pid, here and below: tells a child's last words from those of its successor, which has the same name.
    """

    name: str
    facts: dict[str, int | float | str]
    pid: int = 0


class Heartbeat(Message, frozen=True):
    """From the child's work loop, at least every second."""

    name: str
    pid: int = 0


class ChildFailed(Message, frozen=True):
    """A child is about to exit non-zero, or names another process as hung (`culprit`). `user`: the user can fix it."""

    name: str
    message: str
    user: bool = False
    culprit: str | None = None
    pid: int = 0


class Drained(Message, frozen=True):
    """Tokenizer manager: after `Drain`, no request is left."""

    name: str
    pid: int = 0


class KeepWeights(Message, frozen=True):
    """Scheduler: the ranks of `epoch` have these now, and so shall all that start from here on. Answered by
    `WeightsKept`; dropped when that group is lost already, for then the weights before are in force."""

    name: str
    weights: Weights
    epoch: int
    pid: int = 0


ChildMessage = ChildReady | Heartbeat | ChildFailed | Drained | KeepWeights


class Drain(Message, frozen=True):
    """To the tokenizer manager: refuse new requests, answer `Drained` when none is left."""


class AbortAll(Message, frozen=True):
    """To the tokenizer manager: end every request with this error (None: as aborted), then answer `Drained`."""

    error: ErrorInfo | None = None


class RanksLost(Message, frozen=True):
    """To the scheduler: the rank group is gone. Put its requests back in the queue and wait for the group of `epoch`,
    whose inner sockets are `Endpoints.of_epoch(epoch)`."""

    epoch: int


class ClientsLost(Message, frozen=True):
    """To the scheduler: the tokenizer manager died with its table of requests. Abort them all, tell nobody.

    before: the numbers of its requests are smaller, those of its successor, which may have sent some already, are not.
    """

    before: int


class EngineLost(Message, frozen=True):
    """To the tokenizer manager: a process behind it died with the state of every request. End them all with `error`,
    which clients resume from, and go on taking new ones. scheduler: it is among them, with what it was asked."""

    error: ErrorInfo
    scheduler: bool = True


class WeightsKept(Message, frozen=True):
    """To the scheduler: see `KeepWeights`. number: of the weights."""

    number: int


class Shutdown(Message, frozen=True):
    """To every child: leave the work loop and exit 0."""


LauncherMessage = Drain | AbortAll | RanksLost | ClientsLost | EngineLost | WeightsKept | Shutdown
