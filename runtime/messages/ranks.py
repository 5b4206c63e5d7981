"""Scheduler <-> model workers: one step to every rank, and what came of it from rank 0.

Ranks start and die together, as a group; groups are numbered from 0, and the number, the *epoch*, is in every message
here. Whoever gets a message of another epoch than its own drops it.
"""

from __future__ import annotations

import msgspec

from vibe_sgl_lite.runtime.messages.base import Message
from vibe_sgl_lite.runtime.messages.parts import ErrorInfo, TokenLogprob, Weights
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling


class RowAttributes(msgspec.Struct, array_like=True, frozen=True):
    """What tells the rows of one request from others in the model itself, down to its linear layers; the defaults are
    those of a plain row.

    adapter: a number, 0 is the model without an adapter. KV of different adapters is never shared.
    """

    adapter: int = 0


class NewSlot(msgspec.Struct, array_like=True, frozen=True):
    """A row newly admitted to a slot. The ranks forget whatever the slot held before.

    token_ids: int32 bytes of the prompt and, on resumption, of the generated tokens after `num_prompt_tokens`.
    num_computed: tokens whose KV is already in `pages` (radix cache hit), less than the number of token_ids.
    pages: int32 bytes, the slot's page table so far: page_table[slot, 0:len].
    sample_index: which of the request's n samples; its seed is already sampling.seed + sample_index.
    attributes: of all its rows; None for the plain ones.
    """

    slot: int
    uid: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed: int
    pages: bytes
    sampling: ResolvedSampling
    sample_index: int = 0
    attributes: RowAttributes | None = None


class ForwardBatch(Message, frozen=True):
    """One step: an ordered batch of rows, and what changed since the last step. Every rank gets the same bytes.

    A rank applies, in this order: `released`, `new`, page updates, then runs the rows.
    released: int32 slots that are free again.
    page_slots, page_index, page_ids: int32 each, same length: page_table[page_slots[i], page_index[i]] = page_ids[i]
        (new pages at the end of a slot's table, and pages replaced by a shared duplicate).
    row_slots, row_tokens: int32 each: row i runs the next row_tokens[i] tokens of slot row_slots[i]. None means:
        the same rows as in the last step (the common case of pure decode).
    A row's tokens are first those that its slot knows and has not computed. If there are more of them, the row computes
        so many and yields nothing (a prefill chunk's). Else the rest, at most, are *drafts*, which the ranks propose;
        the row *samples*: it yields the drafts that hold and one token more, so 1 to row_tokens[i], and these are
        appended to the slot's tokens by the ranks themselves, so that step N+1 may be sent before the result of step N
        is back. The KV of a rejected draft does not count as computed: the slot's next row begins there.
    The page table always reaches as far as if every draft had held. A slot with a `Pooling` never samples: its last row
    is a chunk's.
    want_logprobs etc. are read from each slot's sampling parameters.
    """

    step: int
    released: bytes = b""
    new: list[NewSlot] = msgspec.field(default_factory=list)
    page_slots: bytes = b""
    page_index: bytes = b""
    page_ids: bytes = b""
    row_slots: bytes | None = None
    row_tokens: bytes | None = None
    epoch: int = 0


class PageMoves(Message, frozen=True):
    """Pages to copy between the pool and the folder of `--cache-dir`; every rank copies its part of each, in the order
    of all messages: what is stored is what the pages hold between the steps before and after. A loaded page is not in
    use by anybody until all ranks have answered.

    number: of the answers, one `PagesMoved` a rank. store, load: 32 bytes a key, and as many pages in store_pages or
    load_pages, int32 bytes. remove: names of files, for rank 0. touch: keys that were used, the last of them last, for
    the order in which a later start finds them; a message of these alone has number -1 and no answer. host: int32
    bytes of 0 for pool to host or 1 for host to pool, the place in host memory, the page, and so on, to be copied in
    this order on the stream of the steps; such a message has nothing else, and no answer.
    """

    number: int
    store: bytes = b""
    store_pages: bytes = b""
    load: bytes = b""
    load_pages: bytes = b""
    remove: list[str] = msgspec.field(default_factory=list)
    touch: bytes = b""
    epoch: int = 0
    host: bytes = b""


class StopRank(Message, frozen=True):
    """Scheduler -> rank: leave the loop and exit 0."""

    epoch: int = 0


class LoadWeights(Message, frozen=True):
    """Scheduler -> rank, while no step runs: take `weights` in place of those in force, which are to be had again if
    any rank cannot. Answered by `RankDone`."""

    weights: Weights
    in_force: Weights
    epoch: int = 0


class SleepRank(Message, frozen=True):
    """Scheduler -> rank, while no step runs: free the KV pool (level 1), or the weights too (2). Answered by
    `RankDone`."""

    level: int
    epoch: int = 0


class WakeRank(Message, frozen=True):
    """Scheduler -> rank: have a KV pool again, and `weights` if they were freed. Answered by another `RankReady`."""

    weights: Weights
    epoch: int = 0


RankInput = ForwardBatch | PageMoves | StopRank | LoadWeights | SleepRank | WakeRank


class FailedRow(msgspec.Struct, array_like=True, frozen=True):
    """Row `row` of the step has NaN or inf in its final hidden states or its logits."""

    row: int
    code: str = "numerical_error"


class RowLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Asked-for logprobs of row `row`: of the tokens that it yielded, in their order, and of the prompt positions that
    this step computed (prompt_first: position of the first of them)."""

    row: int
    sampled: tuple[TokenLogprob, ...] = ()
    prompt_first: int = 0
    prompt: tuple[TokenLogprob, ...] = ()


class RowPooled(msgspec.Struct, array_like=True, frozen=True):
    """What the last row of a request with a `Pooling` gives: float32 bytes."""

    row: int
    values: bytes


class StepTimes(msgspec.Struct, array_like=True, frozen=True):
    """Where rank 0's time went, by part (model_worker/step_timer.py), in seconds.

    began: of `time.monotonic`, when it had the batch. between: from the end of the last step until then, in the order
    of that time. step: from then on until the result was there; the parts follow each other in about this order, but a
    part's calls are added up.
    """

    began: float
    between: dict[str, float]
    step: dict[str, float]


class StepResult(Message, frozen=True):
    """Rank 0 -> scheduler: what each row yielded.

    token_ids: int32 bytes. Without `counts` one a row, -1 for a row that yielded none; with them the tokens of all rows
    behind each other. counts: int32 bytes, how many tokens each row yielded, 0 to its row_tokens; left out when none
    yielded more than one. A failed row yields none; so does one whose grammar's mask was late, which then runs its last
    token again.
    forward_s, total_s: seconds of the forward and of the whole step on rank 0. times: only with --profile.
    drafted: int32 bytes, how many drafts each row ran; left out when none had any.
    """

    step: int
    token_ids: bytes
    failed: list[FailedRow] = msgspec.field(default_factory=list)
    logprobs: list[RowLogprobs] = msgspec.field(default_factory=list)
    forward_s: float = 0.0
    total_s: float = 0.0
    times: StepTimes | None = None
    counts: bytes = b""
    epoch: int = 0
    drafted: bytes = b""
    pooled: list[RowPooled] = msgspec.field(default_factory=list)


class RankReady(Message, frozen=True):
    """Rank 0 -> scheduler, once an epoch and after sleep, when weights and KV pool stand on all ranks.

    kv_pages: usable pages, ids 0..kv_pages-1; the padding page is not among them. page_bytes: of a page on one rank.
    kv_format: what its bytes mean and how they were computed, beyond the model and the settings. host_slots: pages that
    host memory beside the pool holds.
    weights: what all ranks have.
    """

    kv_pages: int
    device: str
    dtype: str
    epoch: int = 0
    page_bytes: int = 0
    kv_format: str = ""
    host_slots: int = 0
    weights: Weights = Weights("", "default")


class PagesMoved(Message, frozen=True):
    """A rank -> scheduler: what came of a `PageMoves`.

    failed: int32 bytes, which of the keys; a page that failed to load holds anything. seconds: that it took.
    error: why nothing can be stored any more, for a person.
    """

    number: int
    rank: int = 0
    failed: bytes = b""
    seconds: float = 0.0
    error: str = ""
    epoch: int = 0


class RankDone(Message, frozen=True):
    """Rank 0 -> scheduler: all ranks have done it; or, with `error`, all have the weights that they had before."""

    error: ErrorInfo | None = None
    epoch: int = 0


RankOutput = RankReady | StepResult | PagesMoved | RankDone
