"""vibe-sgl-lite's public face: the clients of a running engine, and an engine of one's own.

Names are imported when they are first used (PEP 562), so that the engine's processes, which live in this package too,
do not load the client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from vibe_sgl_lite.runtime.client.async_client import AsyncClient, AsyncStream
    from vibe_sgl_lite.runtime.client.client import Client, Stream
    from vibe_sgl_lite.runtime.client.llm import LLM
    from vibe_sgl_lite.runtime.client.outputs import Embedding, Output, OutputChunk
    from vibe_sgl_lite.runtime.errors import (
        ClosedError,
        ConfigError,
        ConnectError,
        ContextLengthError,
        DeadlineError,
        DrainingError,
        EngineDeadError,
        EngineError,
        EngineLostError,
        KVExhaustedError,
        ModelConfigError,
        NumericalError,
        OverloadedError,
        PoisonError,
        ProtocolError,
        RequestError,
        StartupError,
        TokenizerError,
        UserError,
        VibeError,
        WeightsError,
    )
    from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

_HOMES = {
    "LLM": "client.llm",
    "AsyncClient": "client.async_client",
    "AsyncStream": "client.async_client",
    "Client": "client.client",
    "Stream": "client.client",
    "Embedding": "client.outputs",
    "Output": "client.outputs",
    "OutputChunk": "client.outputs",
    "SamplingParams": "settings.sampling_params",
}  # the rest is in runtime/errors.py

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClosedError",
    "ConfigError",
    "ConnectError",
    "ContextLengthError",
    "DeadlineError",
    "DrainingError",
    "Embedding",
    "EngineDeadError",
    "EngineError",
    "EngineLostError",
    "KVExhaustedError",
    "ModelConfigError",
    "NumericalError",
    "Output",
    "OutputChunk",
    "OverloadedError",
    "PoisonError",
    "ProtocolError",
    "RequestError",
    "SamplingParams",
    "StartupError",
    "Stream",
    "TokenizerError",
    "UserError",
    "VibeError",
    "WeightsError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value = importlib.import_module(f"{__name__}.runtime.settings.cli").version()
    else:
        value = getattr(importlib.import_module(f"{__name__}.runtime.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
