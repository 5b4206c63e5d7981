"""Every message on every wire, as tagged `msgspec.Struct`s (array-like, msgpack). No pickle anywhere.

Rules of evolution: new fields only at the end and with a default; `PROTOCOL` is checked at the handshake.
Token ids travel as packed little-endian int32 bytes (`pack_ids` / `unpack_ids`).

A request has three names. `rid` is the client's own. `uid` is the engine's: a number given by the tokenizer manager,
never reused; sample i of a request with n > 1 has uid + i. A *slot* is the row index that a running request holds in
the ranks' tensors; slots are reused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from runtime.chat_format import TextFormat
from runtime.sampling_params import ResolvedSampling

PROTOCOL = 1
# The tokenizer manager names its own limit, from the context length, up to this size; a larger frame would cost the
# client's connection, so clients refuse to send one.
MAX_FRAME_BYTES = 16 * 1024 * 1024


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids, page ids, slots ... as int32 bytes."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises ValueError when the length is no multiple of 4."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every message: the first array element is the class name."""


# ------------------------------------------------------------------------------------------------ shared parts


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An error on a wire; `code` is one of runtime/errors.py."""

    code: str
    message: str
    field: str | None = None


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


class LogprobEntry(msgspec.Struct, array_like=True, frozen=True):
    """`TokenLogprob` with its text, as clients see it. `top` holds entries with an empty `top`.

    text_offset: characters of the sample's decoded text that were complete before this token; None for prompt tokens
    and in `top`. The decoded text is that before stop strings and blocks are cut out of it.
    """

    token_id: int
    logprob: float
    text: str
    top: tuple[LogprobEntry, ...] = ()
    text_offset: int | None = None


class ModelInfo(msgspec.Struct, array_like=True, frozen=True):
    """What a client learns of the model at the handshake."""

    name: str
    context_length: int
    vocab_size: int
    device: str = ""
    dtype: str = ""


# ------------------------------------------------------------------------------- client -> tokenizer manager


class Hello(Message, frozen=True):
    """First message of a session. A wrong protocol number is answered with `Refused` and the session ends."""

    protocol: int
    client: str = ""


class Ping(Message, frozen=True):
    """Sent every 0.5 s by the client's background thread; a session silent for 2.5 s is dead and its requests abort."""

    number: int = 0


class Generate(Message, frozen=True):
    """One request: exactly one of prompt, input_ids (int32 bytes) and messages (chat) is set.

    sampling: a msgpack map of SamplingParams' set fields, decoded on its own so that a bad field is answered by name.
    template_kwargs: passed to the chat template (`enable_thinking`, `tools`).
    json_schema (JSON text), regex, choice: what the output must match; at most one of them.
    max_thinking_tokens: the thinking block of a chat is closed after so many tokens.
    """

    rid: str
    prompt: str | None
    input_ids: bytes | None
    messages: list[dict[str, Any]] | None
    sampling: msgspec.Raw
    priority: int = 0
    cache_salt: str | None = None
    template_kwargs: dict[str, Any] | None = None
    json_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    max_thinking_tokens: int | None = None


class Abort(Message, frozen=True):
    """End one of this session's requests; unknown rids are ignored."""

    rid: str


class Query(Message, frozen=True):
    """`stats`, `health` or `flush_cache`; answered by a `QueryReply` with the same qid."""

    qid: int
    what: Literal["stats", "health", "flush_cache"]


class Goodbye(Message, frozen=True):
    """The client closes: the session and its requests end now."""


ClientMessage = Hello | Ping | Generate | Abort | Query | Goodbye


# ------------------------------------------------------------------------------- tokenizer manager -> client


class Welcome(Message, frozen=True):
    """Answer to `Hello`. `session` is made by the server; `epoch` changes when the engine restarts."""

    protocol: int
    session: str
    epoch: str
    model: ModelInfo


class Refused(Message, frozen=True):
    """A frame could not be served. With a rid it is that request's end (not the end of an older one under the same rid,
    when `error.field` is "rid"). Without, there is no session (any more): wrong protocol, expired, or the engine ends.
    """

    error: ErrorInfo
    rid: str | None = None


class Pong(Message, frozen=True):
    number: int = 0


class Accepted(Message, frozen=True):
    """The request is valid and queued; `sampling` is what it runs with, its seed included."""

    rid: str
    prompt_tokens: int
    sampling: ResolvedSampling


class Chunk(Message, frozen=True):
    """New text and tokens of one sample. The last one of a sample carries `finish` and `usage`.

    first: index of the chunk's first token among the sample's generated tokens; receivers drop what they already have.
    token_ids: int32 bytes. reasoning: new text of the thinking block, in chats. tool_calls: the raw JSON of those that
    are complete now, in chats with tools; all of them can be parsed.
    """

    rid: str
    index: int
    first: int
    token_ids: bytes
    text: str
    finish: Finish | None = None
    usage: Usage | None = None
    logprobs: tuple[LogprobEntry, ...] | None = None
    prompt_logprobs: tuple[LogprobEntry | None, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[str, ...] = ()


class QueryReply(Message, frozen=True):
    """`error` when the query could not be served (a refused flush, a scheduler that does not answer)."""

    qid: int
    values: dict[str, int | float | str | bool]
    error: ErrorInfo | None = None


ServerMessage = Welcome | Refused | Pong | Accepted | Chunk | QueryReply


# ------------------------------------------------------------ tokenizer manager -> scheduler -> detokenizer -> back


class AddRequest(Message, frozen=True):
    """A tokenized request. token_ids: int32 bytes. cache_salt: the radix namespace, "" is the shared one.

    text_format: for the detokenizer; None leaves the text as it is.
    """

    uid: int
    rid: str
    token_ids: bytes
    sampling: ResolvedSampling
    priority: int = 0
    cache_salt: str = ""
    text_format: TextFormat | None = None


class AbortRequest(Message, frozen=True):
    """From the tokenizer manager: the client wants it ended, or is gone. Every sample of the request ends."""

    uid: int


class StopMatched(Message, frozen=True):
    """From the detokenizer: a stop string was found, it has sent the terminal event itself. `uid` is the sample's."""

    uid: int


class SchedulerQuery(Message, frozen=True):
    qid: int
    what: Literal["stats", "flush_cache"]


SchedulerInput = AddRequest | AbortRequest | StopMatched | SchedulerQuery


class OpenText(Message, frozen=True):
    """Scheduler -> detokenizer: text options of a sample, sent once before its first output. `uid` is the sample's.

    cached_tokens: of the prompt, from the radix cache; for the usage of a sample that a stop string ends. A later
    `TokenOutput.usage` overrides it.
    """

    uid: int
    rid: str
    index: int
    prompt_tokens: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    cached_tokens: int = 0
    text_format: TextFormat | None = None


class TokenOutput(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one sample in a step. `first`: index of the first of them among its generated tokens."""

    uid: int
    first: int
    token_ids: bytes
    finish: Finish | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class StepOutput(Message, frozen=True):
    """Scheduler -> detokenizer: what one step brought. A sample never opened (rejected before) is not in here."""

    outputs: list[TokenOutput]


DetokenizerInput = OpenText | StepOutput


class RoutedChunk(msgspec.Struct, array_like=True, frozen=True):
    """One encoded `Chunk` on its way to a client, routed by uid; the tokenizer manager does not decode `payload`.

    num_tokens: generated tokens of the sample up to the end of this chunk, so that the tokenizer manager can end it.
    """

    uid: int
    terminal: bool
    payload: bytes
    num_tokens: int = 0


class ChunkBatch(Message, frozen=True):
    """Detokenizer -> tokenizer manager."""

    chunks: list[RoutedChunk]


class RequestRejected(Message, frozen=True):
    """Scheduler -> tokenizer manager: refused at arrival (overloaded, kv_exhausted). Ends all its samples."""

    uid: int
    error: ErrorInfo


class SchedulerReply(Message, frozen=True):
    """Answer to a `SchedulerQuery`."""

    qid: int
    values: dict[str, int | float | str | bool]
    error: ErrorInfo | None = None


TokenizerInput = ChunkBatch | RequestRejected | SchedulerReply


# ------------------------------------------------------------------------------------- scheduler <-> model workers


class NewSlot(msgspec.Struct, array_like=True, frozen=True):
    """A row newly admitted to a slot. The ranks forget whatever the slot held before.

    token_ids: int32 bytes of the prompt and, on resumption, of the generated tokens after `num_prompt_tokens`.
    num_computed: tokens whose KV is already in `pages` (radix cache hit), less than the number of token_ids.
    pages: int32 bytes, the slot's page table so far: page_table[slot, 0:len].
    sample_index: which of the request's n samples; its seed is already sampling.seed + sample_index.
    """

    slot: int
    uid: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed: int
    pages: bytes
    sampling: ResolvedSampling
    sample_index: int = 0


class ForwardBatch(Message, frozen=True):
    """One step: an ordered batch of rows, and what changed since the last step. Every rank gets the same bytes.

    A rank applies, in this order: `released`, `new`, page updates, then runs the rows.
    released: int32 slots that are free again.
    page_slots, page_index, page_ids: int32 each, same length: page_table[page_slots[i], page_index[i]] = page_ids[i]
        (new pages at the end of a slot's table, and pages replaced by a shared duplicate).
    row_slots, row_tokens: int32 each: row i runs the next row_tokens[i] tokens of slot row_slots[i]. None means:
        the same rows as in the last step (the common case of pure decode).
    A row *samples* when after it every known token of its slot is computed; the sampled token is appended to the slot's
    tokens by the ranks themselves, so that step N+1 may be sent before the result of step N is back.
    want_logprobs etc. are read from each slot's sampling parameters.
    """

    step: int
    released: bytes = b""
    new: list[NewSlot] = []
    page_slots: bytes = b""
    page_index: bytes = b""
    page_ids: bytes = b""
    row_slots: bytes | None = None
    row_tokens: bytes | None = None


class StopRank(Message, frozen=True):
    """Scheduler -> rank: leave the loop and exit 0."""


RankInput = ForwardBatch | StopRank


class FailedRow(msgspec.Struct, array_like=True, frozen=True):
    """Row `row` of the step has NaN or inf in its final hidden states."""

    row: int
    code: str = "numerical_error"


class RowLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Asked-for logprobs of row `row`: of its sampled token (None when the row did not sample), and of the prompt
    positions that this step computed (prompt_first: position of the first of them)."""

    row: int
    sampled: TokenLogprob | None = None
    prompt_first: int = 0
    prompt: tuple[TokenLogprob, ...] = ()


class StepResult(Message, frozen=True):
    """Rank 0 -> scheduler. token_ids: int32 bytes, one a row, -1 for a row that did not sample.

    forward_s, total_s: seconds of the forward and of the whole step on rank 0.
    """

    step: int
    token_ids: bytes
    failed: list[FailedRow] = []
    logprobs: list[RowLogprobs] = []
    forward_s: float = 0.0
    total_s: float = 0.0


class RankReady(Message, frozen=True):
    """Rank 0 -> scheduler, once, after the weights are loaded and the KV pool stands on all ranks.

    kv_pages: usable pages, ids 0..kv_pages-1; the padding page is not among them.
    """

    kv_pages: int
    device: str
    dtype: str


RankOutput = RankReady | StepResult


# ---------------------------------------------------------------------------------------------- launcher <-> children


class ChildReady(Message, frozen=True):
    """A child can do its work. `facts`: what it found at run time (the scheduler tells kv_pages, device, dtype)."""

    name: str
    facts: dict[str, int | float | str]


class Heartbeat(Message, frozen=True):
    """From the child's work loop, at least every second."""

    name: str


class ChildFailed(Message, frozen=True):
    """A child is about to exit non-zero, or names another process as hung (`culprit`). `user`: the user can fix it."""

    name: str
    message: str
    user: bool = False
    culprit: str | None = None


class Drained(Message, frozen=True):
    """Tokenizer manager: after `Drain`, no request is left."""

    name: str


ChildMessage = ChildReady | Heartbeat | ChildFailed | Drained


class Drain(Message, frozen=True):
    """To the tokenizer manager: refuse new requests, answer `Drained` when none is left."""


class AbortAll(Message, frozen=True):
    """To the tokenizer manager: end every request with this error (None: as aborted), then answer `Drained`."""

    error: ErrorInfo | None = None


class Shutdown(Message, frozen=True):
    """To every child: leave the work loop and exit 0."""


LauncherMessage = Drain | AbortAll | Shutdown
