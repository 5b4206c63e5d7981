"""Logprobs in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from vibe_sgl_lite.runtime.messages import LogprobEntry


def chat_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, object]:
    """Of chat completions."""
    return {
        "content": [
            {**_token(entry), "top_logprobs": [_token(alternative) for alternative in entry.top]} for entry in entries
        ],
        "refusal": None,
    }


def _token(entry: LogprobEntry) -> dict[str, object]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.text.encode())}


class CompletionLogprobs:
    """Of completions: four lists that run side by side."""

    def __init__(self) -> None:
        self._begin = 0  # of the generated text, behind a prompt that is shown

    def convert_prompt(
        self, entries: Sequence[LogprobEntry | None], prompt: str, tokens: Sequence[str]
    ) -> dict[str, object]:
        """tokens: the texts of the prompt's."""
        self._begin = len(prompt)
        begins = accumulate(map(len, tokens), initial=0)
        return self._lists(entries, tokens, [min(begin, self._begin) for begin, _ in zip(begins, tokens, strict=False)])

    def convert(self, entries: Sequence[LogprobEntry]) -> dict[str, object]:
        offsets = [self._begin + (entry.text_offset or 0) for entry in entries]
        return self._lists(entries, [entry.text for entry in entries], offsets)

    @staticmethod
    def _lists(
        entries: Sequence[LogprobEntry | None], tokens: Sequence[str], offsets: Sequence[int]
    ) -> dict[str, object]:
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else _by_text(entry) for entry in entries],
            "text_offset": offsets,
        }


def _by_text(entry: LogprobEntry) -> dict[str, float]:
    """The likeliest tokens and the one that came; of several with the same text, the likeliest."""
    found = {top.text: top.logprob for top in reversed(entry.top)}
    found.setdefault(entry.text, entry.logprob)
    return found


def join(parts: Sequence[dict[str, object]]) -> dict[str, object]:
    """One of several that follow each other; both shapes."""
    joined: dict[str, object] = dict(parts[0])
    for part in parts[1:]:
        for key, values in part.items():
            mine = joined[key]
            if isinstance(mine, list) and isinstance(values, list):
                joined[key] = [*mine, *values]
    return joined
