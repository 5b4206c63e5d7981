"""Every message on every wire, as tagged `msgspec.Struct`s (array-like, msgpack). No pickle anywhere. One file an edge:

    client       client <-> tokenizer manager
    scheduler    tokenizer manager and detokenizer -> scheduler, and its answers
    detokenizer  scheduler -> detokenizer -> tokenizer manager
    ranks        scheduler <-> model workers
    control      launcher <-> children
    base, parts  what these are made of

Rules of evolution: new fields only at the end and with a default; `PROTOCOL` is checked at the handshake.
Token ids travel as packed little-endian int32 bytes (`pack_ids` / `unpack_ids`).

A request has three names. `rid` is the client's own. `uid` is the engine's: a number given by the tokenizer manager,
never reused; sample i of a request with n > 1 has uid + i. A *slot* is the row index that a running request holds in
the ranks' tensors; slots are reused.
"""

from vibe_sgl_lite.runtime.messages.base import (
    Message,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.messages.client import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Abort,
    Accepted,
    Chunk,
    Chunks,
    ClientMessage,
    Generate,
    Goodbye,
    Hello,
    LogprobEntry,
    ModelInfo,
    Ping,
    Pong,
    Query,
    QueryReply,
    Refused,
    ServerMessage,
    Welcome,
    check_fields,
    decode_extension,
    encode_request,
    join_chunks,
)
from vibe_sgl_lite.runtime.messages.control import (
    AbortAll,
    ChildFailed,
    ChildMessage,
    ChildReady,
    ClientsLost,
    Drain,
    Drained,
    EngineLost,
    Heartbeat,
    LauncherMessage,
    RanksLost,
    Shutdown,
)
from vibe_sgl_lite.runtime.messages.detokenizer import (
    ChunkBatch,
    DetokenizerInput,
    OpenText,
    RoutedChunk,
    StepOutput,
    TokenizerInput,
    TokenOutput,
)
from vibe_sgl_lite.runtime.messages.parts import (
    ErrorInfo,
    Finish,
    TokenLogprob,
    Usage,
)
from vibe_sgl_lite.runtime.messages.ranks import (
    FailedRow,
    ForwardBatch,
    NewSlot,
    RankInput,
    RankOutput,
    RankReady,
    RowAttributes,
    RowLogprobs,
    StepResult,
    StepTimes,
    StopRank,
)
from vibe_sgl_lite.runtime.messages.scheduler import (
    AbortRequest,
    AddRequest,
    RequestRejected,
    SchedulerInput,
    SchedulerQuery,
    SchedulerReply,
    StopMatched,
)

__all__ = [
    "MAX_FRAME_BYTES",
    "PROTOCOL",
    "Abort",
    "AbortAll",
    "AbortRequest",
    "Accepted",
    "AddRequest",
    "ChildFailed",
    "ChildMessage",
    "ChildReady",
    "Chunk",
    "ChunkBatch",
    "Chunks",
    "ClientMessage",
    "ClientsLost",
    "DetokenizerInput",
    "Drain",
    "Drained",
    "EngineLost",
    "ErrorInfo",
    "FailedRow",
    "Finish",
    "ForwardBatch",
    "Generate",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "LauncherMessage",
    "LogprobEntry",
    "Message",
    "ModelInfo",
    "NewSlot",
    "OpenText",
    "Ping",
    "Pong",
    "Query",
    "QueryReply",
    "RankInput",
    "RankOutput",
    "RankReady",
    "RanksLost",
    "Refused",
    "RequestRejected",
    "RoutedChunk",
    "RowAttributes",
    "RowLogprobs",
    "SchedulerInput",
    "SchedulerQuery",
    "SchedulerReply",
    "ServerMessage",
    "Shutdown",
    "StepOutput",
    "StepResult",
    "StepTimes",
    "StopMatched",
    "StopRank",
    "TokenLogprob",
    "TokenOutput",
    "TokenizerInput",
    "Usage",
    "Welcome",
    "check_fields",
    "decode_extension",
    "encode_request",
    "join_chunks",
    "pack_ids",
    "unpack_ids",
]
