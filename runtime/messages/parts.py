"""What messages of several edges hold: errors, how a request ended, usage, logprobs."""

from __future__ import annotations

from typing import Literal

import msgspec


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An error on a wire; `code` is one of runtime/errors.py."""

    code: str
    message: str
    field: str | None = None


class Weights(msgspec.Struct, array_like=True, frozen=True):
    """Which weights: a folder, "" for made-up ones; the version that users know them by; how many changes came before
    them since the start."""

    folder: str
    version: str
    number: int = 0


class Finish(msgspec.Struct, array_like=True, frozen=True):
    """Why a request ended. `matched`: the end/stop token id or the stop string. `error`: only with reason "error"."""

    reason: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    error: ErrorInfo | None = None


class Usage(msgspec.Struct, array_like=True, frozen=True):
    """Tokens of one request. `cached_tokens` of the prompt came from the radix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """One position's logprob of the raw model distribution, with the most likely alternatives as (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TextFormat(msgspec.Struct, array_like=True, frozen=True):
    """What to take out of a chat's text. think: a leading thinking block; inside: the prompt has opened it already.
    tools: tool calls."""

    think: bool = False
    inside: bool = False
    tools: bool = False
