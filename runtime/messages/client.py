"""Client <-> tokenizer manager: sessions, requests, and what comes back of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from vibe_sgl_lite.runtime.messages.base import Message
from vibe_sgl_lite.runtime.messages.parts import ErrorInfo, Finish, Usage
from vibe_sgl_lite.runtime.messages.scheduler import ControlArgs, ControlCall
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.runtime.settings.schema import Spec

PROTOCOL = 3
# The tokenizer manager names its own limit, from the context length, up to this size; a larger frame would cost the
# client's connection, so clients refuse to send one.
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_PRIORITY = 2**31 - 1
MAX_DIMENSIONS = 2**20


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
    """First message of a session. A wrong protocol number is answered with `Refused` and the session ends.

    pid: of the client's process. The program that started the engine may be silent: the engine ends with it anyway.
    """

    protocol: int
    client: str = ""
    pid: int = 0


class Ping(Message, frozen=True):
    """Sent every 0.5 s by the client's background thread; a session silent for 2.5 s is dead and its requests abort,
    but for that of the program that started the engine."""

    number: int = 0


class Generate(Message, frozen=True):
    """One request: exactly one of prompt, input_ids (int32 bytes), messages (chat) and pair is set.

    sampling: a msgpack map of SamplingParams' set fields, decoded on its own so that a bad field is answered by name.
    template_kwargs: variables of the chat template (`enable_thinking`, `tools`).
    json_schema (JSON text), regex, choice, grammar (Lark): what the output must match; at most one of them.
    resume_ids: of a request that is sent again, the tokens that the client has of each sample (int32 bytes), None for a
    sample that has ended; they count as generated, and what comes is what follows them. `sampling` then has the seed.
    payer: of a client that serves others, for whom it asks: these take turns, not the client's sessions.
    dimensions: what is asked for is no text but the embedding of a prompt or of input_ids; 0 is as many as there are.
    pair: instruction, query and document, whose relevance is asked for: the probabilities of "yes" and "no".
    streamed: somebody reads tokens as they come; else only the end counts.
    """

    rid: Annotated[str, Spec("names the request in its session", chars=256)]
    prompt: str | None
    input_ids: bytes | None
    messages: list[dict[str, Any]] | None
    sampling: msgspec.Raw
    priority: Annotated[
        int,
        Spec(
            "higher goes first, where the engine runs with `--schedule-policy priority`",
            low=-MAX_PRIORITY,
            high=MAX_PRIORITY,
        ),
    ] = 0
    cache_salt: Annotated[
        str | None, Spec("only requests with the same salt share cached prefixes", unset="none", chars=256)
    ] = None
    template_kwargs: dict[str, Any] | None = None
    json_schema: Annotated[
        str | None, Spec("dict or JSON text: the output is a JSON document that validates", unset="none")
    ] = None
    regex: Annotated[str | None, Spec("the output is a full match", unset="none")] = None
    choice: Annotated[Sequence[str] | None, Spec("the output is one of these texts", unset="none")] = None
    max_thinking_tokens: Annotated[
        int | None,
        Spec(
            "a chat's thinking block is closed after so many tokens",
            unset="no limit",
            low=0,
            high=2**31 - 1,
        ),
    ] = None
    grammar: Annotated[str | None, Spec("the output is what this grammar in Lark's syntax describes", unset="none")] = (
        None
    )
    resume_ids: list[bytes | None] | None = None
    payer: str = ""
    dimensions: Annotated[
        int | None, Spec("values of an embedding", unset="none is asked for", low=0, high=MAX_DIMENSIONS)
    ] = None
    pair: Annotated[
        Sequence[str] | None, Spec("instruction, query and document", unset="no relevance is asked for", items=3)
    ] = None
    streamed: bool = True


class Abort(Message, frozen=True):
    """End one of this session's requests; unknown rids are ignored.

    fellows: also those of this rid in all sessions whose clients have the same name (`Hello.client`); "" is any rid.
    """

    rid: str
    fellows: bool = False


What = Literal["stats", "health", "flush_cache", "watch"] | ControlCall


class Query(Message, frozen=True):
    """Answered by a `QueryReply` with the same qid. `watch`: its value `snapshot` is the JSON text of
    scheduler/snapshot.py. args: of a `ControlCall`, see scheduler/control.py."""

    qid: int
    what: What
    args: ControlArgs = msgspec.field(default_factory=dict)


class Goodbye(Message, frozen=True):
    """The client closes: the session and its requests end now."""


ClientMessage = Hello | Ping | Generate | Abort | Query | Goodbye


class Welcome(Message, frozen=True):
    """Answer to `Hello`. `session` is made by the server; `epoch` changes when the engine restarts.

    capacity: samples that may run or wait at once; clients keep more than that back. 0: not told.
    """

    protocol: int
    session: str
    epoch: str
    model: ModelInfo
    capacity: int = 0


class Refused(Message, frozen=True):
    """A frame could not be served. With a rid it is that request's end (not the end of an older one under the same rid,
    when `error.field` is "rid"). Without, there is no session (any more): wrong protocol, expired, or the engine ends.
    """

    error: ErrorInfo
    rid: str | None = None


class Pong(Message, frozen=True):
    number: int = 0


class Accepted(Message, frozen=True):
    """The request is valid and queued; `sampling` is what it runs with, its seed included.

    Of a request that was sent again, nothing new is in here."""

    rid: str
    prompt_tokens: int
    sampling: ResolvedSampling


class Chunk(Message, frozen=True):
    """New text and tokens of one sample. The last one of a sample carries `finish` and `usage`.

    first: index of the chunk's first token among the sample's generated tokens; receivers drop what they already have.
    token_ids: int32 bytes. reasoning: new text of the thinking block, in chats. tool_calls: the raw JSON of those that
    are complete now, in chats with tools; all of them can be parsed. pooled: float32 bytes, what a `Pooling` gives; it
    comes with the end. weight_versions: where another version than before begins, and in the first chunk: the index of
    the first token that it made, and the version.
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
    pooled: bytes | None = None
    weight_versions: tuple[tuple[int, str], ...] = ()


class Chunks(Message, frozen=True):
    """What one step brought to the samples of one client, when these are several."""

    chunks: list[Chunk]


class QueryReply(Message, frozen=True):
    """`error` when the query could not be served (a refused flush, a scheduler that does not answer)."""

    qid: int
    values: dict[str, int | float | str | bool]
    error: ErrorInfo | None = None


ServerMessage = Welcome | Refused | Pong | Accepted | Chunk | Chunks | QueryReply
