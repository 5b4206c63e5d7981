"""Client <-> tokenizer manager: sessions, requests, and what comes back of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vibe_sgl_lite.runtime.messages.base import Message
from vibe_sgl_lite.runtime.messages.parts import ErrorInfo, Finish, Usage
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

PROTOCOL = 1
# The tokenizer manager names its own limit, from the context length, up to this size; a larger frame would cost the
# client's connection, so clients refuse to send one.
MAX_FRAME_BYTES = 16 * 1024 * 1024


class ModelInfo(msgspec.Struct, array_like=True, frozen=True):
    """What a client learns of the model at the handshake."""

    name: str
    context_length: int
    vocab_size: int
    device: str = ""
    dtype: str = ""


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
    json_schema (JSON text), regex, choice, grammar (Lark): what the output must match; at most one of them.
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
    grammar: str | None = None


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
