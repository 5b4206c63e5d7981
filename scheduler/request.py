"""One sample as the scheduler sees it: its tokens, its pages, how far it is. Plain data; others act on it."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field

import msgspec

from vibe_sgl_lite.runtime.messages import AddRequest, OpenText, RowAttributes, TokenLogprob, Usage
from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.scheduler.radix_cache import RadixNode

NO_SLOT = -1
TOKEN_BYTES = 4


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """One sample of one client request; a request with n > 1 is n of these with the same `group`.

    tokens: packed int32, the prompt and every generated token known so far.
    kv_limit: how many tokens' KV it can need: of all that it may have but the last, which is never fed back.
    cache_salt: only requests of the same one share cached prefixes; with an adapter, the client's and the adapter.
    """

    uid: int
    group: int
    index: int
    rid: str
    sampling: ResolvedSampling
    priority: int
    session: str
    text_format: TextFormat | None
    attributes: RowAttributes | None
    seq: int
    arrival: float
    tokens: bytearray
    num_prompt_tokens: int
    kv_limit: int
    ends: frozenset[int]
    cache_salt: Hashable
    prompt_logprobs: dict[int, TokenLogprob] | None
    streamed: bool
    uses_cache: bool = True

    slot: int = NO_SLOT
    # The slot's page table. The first `num_shared_pages` belong to the radix tree, up to `node`, which it locks.
    pages: array[int] = field(default_factory=lambda: array("i"))
    node: RadixNode | None = None
    num_shared_pages: int = 0
    reserved_pages: int = 0
    # Tokens whose KV is in `pages`, steps in flight included. A row of t tokens moves it by t, and back by as many as
    # its result says were rejected drafts.
    num_computed_tokens: int = 0
    # Tokens known when it got its slot; below that it is prefilling, from there on a decode row has one token and
    # drafts, and that token may still be on its way back from the step before.
    prefill_end: int = 0
    last_step: int = -1  # the last step with a row of it; it is in flight until that step's result is in
    cached_version: int = -1  # KVMemory.cached_length: the cache's version when it was looked up
    cached_depth: int = 0

    # For scheduler/tiers: the root's key and those of its first pages; at which depth it began to wait for pages
    # to be loaded, and until when it does.
    page_keys: list[bytes] | None = None
    load_depth: int = -1
    load_until: float = 0.0

    cached_tokens: int = -1  # unknown until it first gets a slot
    retractions: int = 0
    guaranteed: bool = False  # retracted so often that it now runs with its whole need reserved
    losses: int = 0  # rank groups in a row that were lost while they ran it and before it had gained a token
    tokens_at_loss: int = 0  # that it had at the last of these
    queued: bool = False  # in the waiting queue
    opened: bool = False
    finished: bool = False
    # Nothing more of it may enter the cache: a row of it had NaN or inf, or its KV is of weights that are gone.
    tainted: bool = False

    # How its drafts fared, for scheduler/speculation.py: those that held and the firsts that did not, old ones fading;
    # and how often there were any, below 0 before the first.
    draft_hits: float = 1.0
    draft_misses: float = 1.0
    draft_found: float = -1.0

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and generated."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def begun(self) -> bool:
        """It has had a slot, here or before a loss."""
        return self.cached_tokens >= 0 or self.num_generated > 0

    @property
    def pools(self) -> bool:
        """It ends with its prompt, and gets a vector in place of tokens."""
        return self.sampling.pooling is not None

    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_generated, max(0, self.cached_tokens))

    def open_text(self, weight_version: str) -> OpenText:
        """The message that introduces it to the detokenizer, to be sent before its first output."""
        s = self.sampling
        return OpenText(
            self.uid,
            self.rid,
            self.index,
            self.num_prompt_tokens,
            s.stop,
            s.include_stop,
            s.skip_special_tokens,
            max(0, self.cached_tokens),
            self.text_format,
            bytes(self.tokens[TOKEN_BYTES * self.num_prompt_tokens :]),
            weight_version,
        )

    def __repr__(self) -> str:
        return f"Request(uid={self.uid}, {self.num_prompt_tokens}+{self.num_generated} tokens, slot={self.slot})"


def samples_of(message: AddRequest, seq: int, now: float) -> list[Request]:
    """The n samples of a request, without those that have ended: sample i has uid + i and seed + i (64 bits)."""
    sampling, attributes = message.sampling, message.attributes
    num_prompt_tokens = len(message.token_ids) // TOKEN_BYTES
    ends = frozenset(sampling.end_token_ids + sampling.stop_token_ids)
    return [
        Request(
            uid=message.uid + index,
            group=message.uid,
            index=index,
            rid=message.rid,
            sampling=msgspec.structs.replace(sampling, seed=(sampling.seed + index) % 2**64) if index else sampling,
            priority=message.priority,
            session=message.session,
            text_format=message.text_format,
            attributes=attributes,
            seq=seq + index,
            arrival=now,
            tokens=bytearray(message.token_ids + resume_ids),
            num_prompt_tokens=num_prompt_tokens,
            kv_limit=num_prompt_tokens + sampling.max_new_tokens - 1,
            ends=ends,
            cache_salt=message.cache_salt if attributes is None else (message.cache_salt, attributes.adapter),
            prompt_logprobs={} if sampling.prompt_logprobs else None,
            streamed=message.streamed,
            prefill_end=num_prompt_tokens + len(resume_ids) // TOKEN_BYTES,
        )
        for index, resume_ids in enumerate(message.resume_ids or [b""] * sampling.n)
        if resume_ids is not None
    ]
