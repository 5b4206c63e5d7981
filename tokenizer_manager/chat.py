"""What the chat format adds to a request: how its text is to be taken apart, and what bounds its thinking block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.settings.sampling_params import ThinkingRules
from vibe_sgl_lite.runtime.text.chat_format import THINK_CLOSE, THINK_CLOSE_LINES, THINK_OPEN
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer


def text_format(prompt: str, template_kwargs: Mapping[str, Any], tokenizer: ChatTokenizer) -> TextFormat:
    """prompt: the rendered chat."""
    think = _think_ids(tokenizer) is not None
    inside = think and prompt.rstrip("\n").endswith(THINK_OPEN)
    return TextFormat(think, inside, bool(template_kwargs.get("tools")))


def thinking_rules(
    text_format: TextFormat,
    limit: int | None,
    constrained: bool,
    template_kwargs: Mapping[str, Any],
    tokenizer: ChatTokenizer,
) -> ThinkingRules | None:
    """None where the ranks need not know of the thinking block. constrained: a grammar holds for what follows it.

    Raises RequestError for a limit where the model has no thinking block.
    """
    ids = _think_ids(tokenizer)
    if ids is None:
        if limit is not None:
            raise RequestError(
                "max_thinking_tokens: this model's chat template has no thinking block; leave it out",
                field="max_thinking_tokens",
            )
        return None
    if limit is None and not constrained:
        return None
    if not text_format.inside and template_kwargs.get("enable_thinking") is False:
        return None  # the prompt holds an empty block: there is nothing to bound
    start, end = ids
    close = tuple(tokenizer.encode(THINK_CLOSE_LINES, add_special_tokens=False))
    return ThinkingRules(start, end, text_format.inside, limit, close, close[close.index(end) + 1 :])


def _think_ids(tokenizer: ChatTokenizer) -> tuple[int, int] | None:
    """The tags' ids, where the chat template knows them and each is one token that is shown in the text."""
    start, end = tokenizer.token_id(THINK_OPEN), tokenizer.token_id(THINK_CLOSE)
    if start is None or end is None or {start, end} & tokenizer.special_ids:
        return None
    return (start, end) if tokenizer.template_mentions(THINK_CLOSE) else None
