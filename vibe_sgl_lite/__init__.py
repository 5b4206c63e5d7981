"""vibe-sgl-lite's public face: the clients of a running engine, and an engine of one's own."""

from runtime.async_client import AsyncClient, AsyncStream
from runtime.client import Client, Stream
from runtime.errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    EngineDeadError,
    EngineError,
    KVExhaustedError,
    ModelConfigError,
    NumericalError,
    OverloadedError,
    ProtocolError,
    RequestError,
    StartupError,
    TokenizerError,
    UserError,
    VibeError,
    WeightsError,
)
from runtime.llm import LLM
from runtime.outputs import Output, OutputChunk
from runtime.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClosedError",
    "ConfigError",
    "ConnectError",
    "EngineDeadError",
    "EngineError",
    "KVExhaustedError",
    "ModelConfigError",
    "NumericalError",
    "Output",
    "OutputChunk",
    "OverloadedError",
    "ProtocolError",
    "RequestError",
    "SamplingParams",
    "StartupError",
    "Stream",
    "TokenizerError",
    "UserError",
    "VibeError",
    "WeightsError",
]
