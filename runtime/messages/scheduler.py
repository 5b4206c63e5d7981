"""Into the scheduler, from the tokenizer manager and the detokenizer; and its answers to the former."""

from __future__ import annotations

from typing import Literal

import msgspec

from vibe_sgl_lite.runtime.messages.base import Message
from vibe_sgl_lite.runtime.messages.parts import ErrorInfo, TextFormat
from vibe_sgl_lite.runtime.messages.ranks import RowAttributes
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling


class AddRequest(Message, frozen=True):
    """A tokenized request. token_ids: int32 bytes. cache_salt: only requests of the same one share cached prefixes.

    text_format: for the detokenizer; None leaves the text as it is. attributes: of its rows; None for the plain ones.
    session: whose request it is (a session, or a payer of it); these get fair shares.
    timeout_s: so long after its arrival it ends as an error.
    resume_ids, streamed: as in `Generate`, checked.
    """

    uid: int
    rid: str
    token_ids: bytes
    sampling: ResolvedSampling
    priority: int = 0
    cache_salt: str = ""
    text_format: TextFormat | None = None
    attributes: RowAttributes | None = None
    session: str = ""
    timeout_s: float | None = None
    resume_ids: list[bytes | None] | None = None
    streamed: bool = True


class AbortRequest(Message, frozen=True):
    """From the tokenizer manager: the client wants it ended, or is gone. Every sample of the request ends."""

    uid: int


class StopMatched(Message, frozen=True):
    """From the detokenizer: a stop string was found, it has sent the terminal event itself. `uid` is the sample's."""

    uid: int


# What stops the steps for a while (scheduler/control.py); its answer may take long.
ControlCall = Literal["pause", "continue", "update_weights", "sleep", "wake"]
ControlArgs = dict[str, str | int | bool | None]


class SchedulerQuery(Message, frozen=True):
    qid: int
    what: Literal["stats", "flush_cache", "watch"] | ControlCall
    args: ControlArgs = msgspec.field(default_factory=dict)


SchedulerInput = AddRequest | AbortRequest | StopMatched | SchedulerQuery


class RequestRejected(Message, frozen=True):
    """Scheduler -> tokenizer manager: refused at arrival (overloaded, kv_exhausted). Ends all its samples."""

    uid: int
    error: ErrorInfo


class SchedulerReply(Message, frozen=True):
    """Answer to a `SchedulerQuery`."""

    qid: int
    values: dict[str, int | float | str | bool]
    error: ErrorInfo | None = None
