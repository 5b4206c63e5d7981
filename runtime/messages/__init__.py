"""Every message on every wire, as tagged `msgspec.Struct`s (array-like, msgpack). No pickle anywhere. One file an edge:

    client       client <-> tokenizer manager; encoding: what msgspec alone does not do
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

# ruff: noqa: I001  (names exported as themselves, several a line of import)

from vibe_sgl_lite.runtime.messages.base import (
    Message as Message,
    numbers_from_now as numbers_from_now,
    pack_ids as pack_ids,
    split_ids as split_ids,
    unpack_ids as unpack_ids,
)
from vibe_sgl_lite.runtime.messages.client import (
    MAX_FRAME_BYTES as MAX_FRAME_BYTES,
    PROTOCOL as PROTOCOL,
    Abort as Abort,
    Accepted as Accepted,
    Chunk as Chunk,
    Chunks as Chunks,
    ClientMessage as ClientMessage,
    Generate as Generate,
    Goodbye as Goodbye,
    Hello as Hello,
    LogprobEntry as LogprobEntry,
    ModelInfo as ModelInfo,
    Ping as Ping,
    Pong as Pong,
    Query as Query,
    What as What,
    QueryReply as QueryReply,
    Refused as Refused,
    ServerMessage as ServerMessage,
    Welcome as Welcome,
)
from vibe_sgl_lite.runtime.messages.control import (
    AbortAll as AbortAll,
    ChildFailed as ChildFailed,
    ChildMessage as ChildMessage,
    ChildReady as ChildReady,
    ClientsLost as ClientsLost,
    Drain as Drain,
    Drained as Drained,
    EngineLost as EngineLost,
    Heartbeat as Heartbeat,
    KeepWeights as KeepWeights,
    LauncherMessage as LauncherMessage,
    RanksLost as RanksLost,
    Shutdown as Shutdown,
    WeightsKept as WeightsKept,
)
from vibe_sgl_lite.runtime.messages.detokenizer import (
    ChunkBatch as ChunkBatch,
    DetokenizerInput as DetokenizerInput,
    NewScheduler as NewScheduler,
    NewWeights as NewWeights,
    NextTokens as NextTokens,
    OpenText as OpenText,
    RoutedChunk as RoutedChunk,
    StepOutput as StepOutput,
    TokenizerInput as TokenizerInput,
    TokenOutput as TokenOutput,
)
from vibe_sgl_lite.runtime.messages.encoding import (
    check_fields as check_fields,
    decode_extension as decode_extension,
    encode_request as encode_request,
    encode_values as encode_values,
    join_chunks as join_chunks,
)
from vibe_sgl_lite.runtime.messages.parts import (
    ErrorInfo as ErrorInfo,
    Finish as Finish,
    TokenLogprob as TokenLogprob,
    Usage as Usage,
    Weights as Weights,
)
from vibe_sgl_lite.runtime.messages.ranks import (
    FailedRow as FailedRow,
    ForwardBatch as ForwardBatch,
    LoadWeights as LoadWeights,
    NewSlot as NewSlot,
    PageMoves as PageMoves,
    PagesMoved as PagesMoved,
    RankDone as RankDone,
    RankInput as RankInput,
    RankOutput as RankOutput,
    RankReady as RankReady,
    RowAttributes as RowAttributes,
    RowLogprobs as RowLogprobs,
    RowPooled as RowPooled,
    SleepRank as SleepRank,
    StepResult as StepResult,
    StepTimes as StepTimes,
    StopRank as StopRank,
    WakeRank as WakeRank,
)
from vibe_sgl_lite.runtime.messages.scheduler import (
    AbortRequest as AbortRequest,
    AddRequest as AddRequest,
    ControlArgs as ControlArgs,
    ControlCall as ControlCall,
    RequestRejected as RequestRejected,
    SchedulerInput as SchedulerInput,
    SchedulerQuery as SchedulerQuery,
    SchedulerReply as SchedulerReply,
    StopMatched as StopMatched,
)
