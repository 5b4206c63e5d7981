"""Every error of the engine, as one tree.

    VibeError
    ├── UserError (also a ValueError)      the caller can fix it: bad flag, bad request, bad model folder
    │   ├── ConfigError                    a flag or a config file
    │   ├── ModelConfigError               config.json, generation_config.json
    │   ├── WeightsError                   checkpoint files
    │   ├── TokenizerError                 tokenizer files, chat template
    │   └── RequestError                   one request; its code is "invalid_request"
    │       └── ContextLengthError         "context_length_exceeded": it does not fit the model's context
    └── EngineError (also a RuntimeError)  the engine could not do what was asked
        ├── StartupError                   the pipeline did not come up
        ├── EngineDeadError                "engine_dead": a process died or the connection was lost
        │   ├── EngineLostError            "engine_lost": as before, but the engine starts again; clients resume
        │   └── ConnectError               nobody answers at the address (also a ConnectionError)
        ├── ClosedError                    "closed": the client itself was closed, before the call or during it
        ├── OverloadedError                "overloaded": the queue is full
        │   └── DrainingError              "draining": the engine is about to stop, and takes nothing new
        ├── KVExhaustedError               "kv_exhausted": the request cannot fit the empty KV pool
        ├── NumericalError                 "numerical_error": NaN or inf in this request's hidden states or logits
        ├── DeadlineError                  "deadline": the request's timeout_s is over
        ├── PoisonError                    "poison": model workers died again and again while they ran this request
        └── ProtocolError                  "protocol": wrong protocol version, or a frame that makes no sense

On a wire an error is an `ErrorInfo` (runtime/messages/parts.py); `error_from_code` turns it back into one of these.
"""

from __future__ import annotations

from typing import Any


class VibeError(Exception):
    """Root of the tree. `code` is the stable, machine-readable name that also travels on the wire.

    output: what a request had generated when the engine failed it: an `Output` (a list where n > 1); else None.
    """

    code = "error"
    output: Any = None


class UserError(VibeError, ValueError):
    """Something the caller can fix.

    `field` names what was wrong, for programs to react to; the message holds field, value, limit and what to do.
    """

    code = "invalid_argument"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(UserError):
    """A flag, a keyword of `LLM`, or a line of a config file."""


class ModelConfigError(UserError):
    """The model folder's config.json or generation_config.json."""


class WeightsError(UserError):
    """The model folder's safetensors files."""


class TokenizerError(UserError):
    """The tokenizer's files or its chat template."""


class RequestError(UserError):
    """One request was refused; nothing of it ran."""

    code = "invalid_request"


class ContextLengthError(RequestError):
    """Prompt and asked-for output do not fit the context length; a caller may shorten the prompt and try again."""

    code = "context_length_exceeded"


class EngineError(VibeError, RuntimeError):
    """The engine could not do what was asked, through no fault of the request."""

    code = "internal_error"


class StartupError(EngineError):
    """The pipeline did not come up; the message names the process and its cause. user: whether the user can fix it."""

    code = "startup"

    def __init__(self, message: str, *, user: bool = False) -> None:
        super().__init__(message)
        self.user = user


class EngineDeadError(EngineError):
    """A process of the engine died, or the connection to it was lost."""

    code = "engine_dead"


class EngineLostError(EngineDeadError):
    """A process of the engine died with what it knew of a request, and starts again."""

    code = "engine_lost"


class ConnectError(EngineDeadError, ConnectionError):
    """Nobody answers at the address."""


class ClosedError(EngineError):
    """This client was closed, before the call or during it."""

    code = "closed"


class OverloadedError(EngineError):
    """More waits already than the engine takes; try again later."""

    code = "overloaded"


class DrainingError(OverloadedError):
    """The engine is about to stop, and takes nothing new."""

    code = "draining"


class KVExhaustedError(EngineError):
    """The request cannot fit the KV pool, even alone."""

    code = "kv_exhausted"


class NumericalError(EngineError):
    """NaN or inf in this request's hidden states or logits."""

    code = "numerical_error"


class DeadlineError(EngineError):
    """The request's `timeout_s` is over."""

    code = "deadline"


class PoisonError(EngineError):
    """Model workers died again and again while they ran this request."""

    code = "poison"


class ProtocolError(EngineError):
    """The engine speaks another version, or a frame made no sense."""

    code = "protocol"


def error_from_code(code: str, message: str, field: str | None = None) -> VibeError:
    """The exception that stands for an error that came over a wire; an unknown code becomes a plain EngineError."""
    if code in (RequestError.code, UserError.code):
        return RequestError(message, field=field)
    if code == ContextLengthError.code:
        return ContextLengthError(message, field=field)
    for kind in (
        EngineDeadError,
        EngineLostError,
        OverloadedError,
        DrainingError,
        KVExhaustedError,
        NumericalError,
        DeadlineError,
        PoisonError,
        ProtocolError,
        StartupError,
    ):
        if kind.code == code:
            return kind(message)
    return EngineError(message)
