"""Which requests are not taken, and what they are told: too long for the empty pool, or the queue is full."""

from __future__ import annotations

from vibe_sgl_lite.runtime.errors import KVExhaustedError, OverloadedError
from vibe_sgl_lite.runtime.messages import AddRequest, ErrorInfo
from vibe_sgl_lite.scheduler.memory import KVMemory
from vibe_sgl_lite.scheduler.state import SchedulerState


def too_long(memory: KVMemory, prompt_tokens: int, max_new_tokens: int) -> ErrorInfo | None:
    """Why the empty pool could not hold such a request; the last token needs no place."""
    pages = memory.pages_for(prompt_tokens + max_new_tokens - 1)
    if pages <= memory.num_pages:
        return None
    return ErrorInfo(
        KVExhaustedError.code,
        f"prompt of {prompt_tokens} tokens with max_new_tokens={max_new_tokens} "
        f"needs {pages} KV pages of {memory.page_size} tokens, the pool has {memory.num_pages}: ask for less or "
        "raise --max-total-tokens",
    )


def why_full(state: SchedulerState, message: AddRequest) -> ErrorInfo | None:
    """Why the queue has no room for a request; a newcomer fits into one that others filled."""
    config, waiting = state.config, state.waiting
    room = 1.0 if message.session in state.shares else 1.125
    if len(waiting) - len(state.free_slots) >= config.max_queued_requests * room:
        text = f"the queue is full: max_queued_requests={config.max_queued_requests}; try again later"
    elif waiting.num_bytes + len(message.token_ids) * message.sampling.n > config.max_queued_bytes * room:
        text = f"the queue is full: its prompts take {waiting.num_bytes >> 20} MiB, "
        text += f"{config.max_queued_bytes >> 20} may be; try again later"
    else:
        return None
    return ErrorInfo(OverloadedError.code, text)
