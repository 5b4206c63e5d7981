"""What the scheduler core is told once, at its start."""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """num_pages: usable KV pages, ids 0..num_pages-1. page_size: tokens a page.

    max_running_requests: slots, 0..max-1. max_queued_requests: requests that may wait beyond those that find a slot.
    max_queued_bytes: of token ids that may wait, whatever the number of requests.
    fairness: sessions take turns by tokens (scheduler/fairness.py).
    chunked_prefill_size: prompt tokens a step at most. policy: a name in scheduler/policies.
    overlap: two steps in flight instead of one.
    ahead_s: with overlap, a third step is sent while the two in flight are expected to take less than this: steps may
        be shorter than the way of a result to here and of a step to the ranks, who would wait.
    smallest_chunk: tokens of a step's chunks at least, if prompts have them, whatever the cost: reading a long context
        for a few tokens is dear, and where a device is fast, so is a chunk. fresh_chunk: the same of the beginnings of
        prompts, the first fresh_prompt tokens of each, before which there is little to read.
    step_sizes: numbers of tokens, ascending, that the device fills steps with chunks up to: a chunk that has to be cut
        is cut so that its step has one of them.
    max_step_stretch: while requests decode whose tokens are streamed, a step with chunks takes at most so many times
        what decoding alone would.
    conservativeness: factor on the share of the remaining output that admission keeps room for.
    draft_tokens: what a decode row may run beyond its one known token at most; the ranks propose and check them.
    draft_budget: of all rows of a step; what is sampled for them takes memory on the ranks.
    epoch: the number of the first rank group.
    weight_version: of the first weights.
    base_tokens: a guess, until steps are measured, at how many tokens' work an empty step costs.
    """

    num_pages: int
    page_size: int = 16
    max_running_requests: int = 256
    max_queued_requests: int = 2048
    max_queued_bytes: int = 256 * 2**20
    fairness: bool = True
    chunked_prefill_size: int = 512
    policy: str = "fcfs"
    radix_cache: bool = True
    overlap: bool = True
    ahead_s: float = 0.0
    smallest_chunk: int = 8
    fresh_chunk: int = 8
    fresh_prompt: int = 4
    step_sizes: tuple[int, ...] = ()
    max_step_stretch: float = 3.0
    conservativeness: float = 1.0
    base_tokens: float = 16.0
    draft_tokens: int = 0
    draft_budget: int = 64
    epoch: int = 0
    weight_version: str = "default"
