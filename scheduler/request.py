"""One sample as the scheduler sees it: its tokens, its pages, how far it is. Plain data; others act on it."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

import msgspec

from vibe_sgl_lite.runtime.messages import AddRequest, OpenText, TokenLogprob, Usage
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.scheduler.radix_cache import RadixNode

NO_SLOT = -1
TOKEN_BYTES = 4


class Request:
    """One sample of one client request; a request with n > 1 is n of these with the same `group`.

    tokens: packed int32, the prompt and every generated token known so far.
    num_computed_tokens: tokens whose KV is in `pages`, steps in flight included. A row of t tokens moves it by t, and
        back by as many as its result says were rejected drafts.
    losses: rank groups in a row that were lost while they ran it and before it had gained a token; tokens_at_loss: how
        many tokens it had at the last of them.
    prefill_end: tokens known when it got its slot; below that it is prefilling, from there on a decode row has one
        token, which may still be on its way back from the step before.
    limit: number of tokens, prompt included, at which it ends by length. The last one is never fed back, so the KV of
        `kv_limit` = limit - 1 tokens is all it can need.
    last_step: the last step with a row of it; it is in flight until that step's result is in.
    cache_salt: only requests of the same one share cached prefixes; with an adapter, the client's and the adapter.
    pages: the slot's page table. The first `num_shared_pages` belong to the radix tree, up to `node`, which it locks.
    """

    __slots__ = (
        "arrival",
        "attributes",
        "cache_salt",
        "cached_depth",
        "cached_tokens",
        "cached_version",
        "ends",
        "failed",
        "finished",
        "group",
        "guaranteed",
        "index",
        "kv_limit",
        "last_step",
        "limit",
        "losses",
        "node",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_shared_pages",
        "opened",
        "pages",
        "prefill_end",
        "priority",
        "prompt_logprobs",
        "queued",
        "reserved_pages",
        "retractions",
        "rid",
        "sampling",
        "seq",
        "session",
        "slot",
        "text_format",
        "tokens",
        "tokens_at_loss",
        "uid",
        "uses_cache",
    )

    def __init__(
        self,
        message: AddRequest,
        index: int,
        sampling: ResolvedSampling,
        seq: int,
        arrival: float,
        resume_ids: bytes = b"",
    ) -> None:
        self.uid = message.uid + index
        self.group = message.uid
        self.index = index
        self.rid = message.rid
        self.sampling = sampling
        self.priority = message.priority
        self.session = message.session
        self.cache_salt: Hashable = message.cache_salt
        if message.attributes is not None:
            self.cache_salt = message.cache_salt, message.attributes.adapter
        self.text_format = message.text_format
        self.attributes = message.attributes
        self.uses_cache = True
        self.seq = seq
        self.arrival = arrival
        self.tokens = bytearray(message.token_ids)
        self.num_prompt_tokens = len(self.tokens) // TOKEN_BYTES
        self.tokens += resume_ids
        self.limit = self.num_prompt_tokens + sampling.max_new_tokens
        self.kv_limit = self.limit - 1
        self.ends = frozenset(sampling.end_token_ids + sampling.stop_token_ids)
        self.prompt_logprobs: dict[int, TokenLogprob] | None = {} if sampling.prompt_logprobs else None

        self.slot = NO_SLOT
        self.pages = array("i")
        self.node: RadixNode | None = None
        self.num_shared_pages = 0
        self.reserved_pages = 0
        self.num_computed_tokens = 0
        self.prefill_end = self.num_tokens
        self.last_step = -1
        self.cached_version = -1  # KVMemory.cached_length: the cache's version when it was looked up
        self.cached_depth = 0

        self.cached_tokens = -1  # unknown until it first gets a slot
        self.retractions = 0
        self.losses = 0
        self.tokens_at_loss = 0
        self.guaranteed = False  # retracted so often that it now runs with its whole need reserved
        self.queued = False  # in the waiting queue
        self.opened = False
        self.finished = False
        self.failed = False  # a row of it had NaN or inf: nothing more of it may enter the cache

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and generated."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.prefill_end

    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_generated, max(0, self.cached_tokens))

    def open_text(self) -> OpenText:
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
        )

    def __repr__(self) -> str:
        return f"Request(uid={self.uid}, {self.num_prompt_tokens}+{self.num_generated} tokens, slot={self.slot})"


def samples_of(message: AddRequest, seq: int, now: float) -> list[Request]:
    """The n samples of a request, without those that have ended: sample i has uid + i and seed + i (64 bits)."""
    samples = []
    for index, resume_ids in enumerate(message.resume_ids or [b""] * message.sampling.n):
        if resume_ids is None:
            continue
        sampling = message.sampling
        if index:
            sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + index) % 2**64)
        samples.append(Request(message, index, sampling, seq + index, now, resume_ids))
    return samples
