"""Scheduler -> detokenizer: new tokens. Detokenizer -> tokenizer manager: their text, encoded for the clients."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import msgspec

from vibe_sgl_lite.runtime.messages.base import Message, split_ids
from vibe_sgl_lite.runtime.messages.parts import Finish, TextFormat, TokenLogprob, Usage
from vibe_sgl_lite.runtime.messages.scheduler import RequestRejected, SchedulerReply


class OpenText(Message, frozen=True):
    """Scheduler -> detokenizer: text options of a sample, sent once before its first output. `uid` is the sample's.

    resume_ids: int32 bytes of tokens whose text the client has already. weight_version: of what makes its first tokens.
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
    resume_ids: bytes = b""
    weight_version: str = "default"


class TokenOutput(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """New tokens of one sample in a step. `first`: index of the first of them among its generated tokens.

    pooled: float32 bytes, in place of tokens, of a sample with a `Pooling`."""

    uid: int
    first: int
    token_ids: bytes
    finish: Finish | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    pooled: bytes | None = None


class NextTokens(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Samples of which there is nothing to tell but their next token. Iterates over (uid, the token's 4 bytes).

    uids: packed int64. token_ids: packed int32, one each.
    """

    uids: bytes = b""
    token_ids: bytes = b""

    def __len__(self) -> int:
        return len(self.uids) // 8

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return zip(array("q", self.uids), split_ids(self.token_ids), strict=True)


class StepOutput(Message, frozen=True):
    """Scheduler -> detokenizer: what one step brought; a sample is named once. None is here that was never opened."""

    outputs: list[TokenOutput]
    next_tokens: NextTokens = NextTokens()


class NewWeights(Message, frozen=True):
    """Scheduler -> detokenizer: what follows was made by weights of this version."""

    version: str


class NewScheduler(Message, frozen=True):
    """Scheduler -> detokenizer, its first word: what one that died has opened never ends."""


DetokenizerInput = OpenText | StepOutput | NewWeights | NewScheduler


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


TokenizerInput = ChunkBatch | RequestRejected | SchedulerReply
