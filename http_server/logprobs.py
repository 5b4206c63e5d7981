"""Logprobs in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Of completions: four lists that run side by side. offset: characters that stand before the first entry."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def convert(self, entries: Sequence[LogprobEntry | None], prompt_texts: Sequence[str] = ()) -> dict[str, object]:
        """Goes on where the last call ended. prompt_texts: of the entries, where they are of a prompt."""
        tokens, offsets = [], []
        for place, entry in enumerate(entries):
            text = prompt_texts[place] if prompt_texts else "" if entry is None else entry.text
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
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
