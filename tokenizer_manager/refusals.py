"""Why a request is not taken, and how a client is told."""

from __future__ import annotations

import logging

import msgspec

from vibe_sgl_lite.runtime.errors import EngineError, RequestError
from vibe_sgl_lite.runtime.messages import ErrorInfo
from vibe_sgl_lite.tokenizer_manager.requests import Load
from vibe_sgl_lite.tokenizer_manager.validate import MAX_ECHO_CHARS

MAX_MESSAGE_CHARS = 1000  # a longer one repeats a long value
SESSION_BYTES = 32 * 2**20  # of one payer's requests that wait to be tokenized
WAITING_BYTES = 128 * 2**20  # of all payers'

log = logging.getLogger(__name__)


def why_full(everybody: Load, own: Load, size: int, most_samples: int) -> str | None:
    """Why no request of `size` bytes is taken from a payer whose open requests make up `own`; None: it is.

    One that has none finds some room where others have filled all of theirs.
    """
    most = most_samples if own.samples else most_samples + most_samples // 8 + 1
    if everybody.samples >= most:
        return f"{everybody.samples} requests run or wait, --max-queued-requests allows no more"
    for load, cap, whose in ((own, SESSION_BYTES, "this client's"), (everybody, WAITING_BYTES, "the")):
        if load.waiting_bytes and load.waiting_bytes + size > cap:
            return f"{whose} prompts that wait to be tokenized have {load.waiting_bytes} bytes, {cap} at most may"
    return None


def short(error: ErrorInfo) -> ErrorInfo:
    """What a client sent may stand in an error: only its beginning goes back."""
    field = None if error.field is None else error.field[:MAX_ECHO_CHARS]
    if len(error.message) <= MAX_MESSAGE_CHARS:
        return msgspec.structs.replace(error, field=field)
    return ErrorInfo(error.code, f"{error.message[:MAX_ECHO_CHARS]} ...", field)


def failure(rid: str, error: BaseException) -> ErrorInfo:
    """What a check or a tokenizer raised: the user's mistake, or ours, which is logged."""
    if isinstance(error, RequestError):
        return info_of(error)
    log.error("request %.80r failed before it ran", rid, exc_info=error)
    return ErrorInfo(EngineError.code, f"the request failed before it ran: {type(error).__name__}: {error}")


def info_of(error: RequestError) -> ErrorInfo:
    return ErrorInfo(error.code, str(error), error.field)
