"""What the answers of chats and completions have in common: their head, usage, end, and what stopped a sample."""

from __future__ import annotations

import time
from typing import ClassVar

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.openai_types import CommonBody
from vibe_sgl_lite.http_server.requests import new_id
from vibe_sgl_lite.http_server.streaming import UsageCounter
from vibe_sgl_lite.runtime.messages import Finish, Usage


class OpenAIAnswer:
    """To one request. ID, OBJECT: how its id begins, and what a chunk is called."""

    ID: ClassVar[str]
    OBJECT: ClassVar[str]

    def __init__(self, model: str, body: CommonBody, call: Call) -> None:
        options = body.stream_options
        self._call = call
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.include_usage and options.continuous_usage_stats)
        self._with_ids = bool(body.return_token_ids)
        self._head = {"id": new_id(self.ID), "object": self.OBJECT, "created": int(time.time()), "model": model}
        self._stop_ids = frozenset(body.stop_token_ids or ())
        self._count = UsageCounter(0)

    def closing(self) -> bytes:
        usage = sse.event(self._chunk(usage=self._usage())) if self._usage_at_end else b""
        return usage + sse.DONE

    def failure(self, error: ApiError) -> bytes:
        return sse.event(error.openai())

    def _chunk(self, *choices: dict[str, object], **more: object) -> dict[str, object]:
        return {**self._head, "choices": choices, **more}

    def _event(self, choice: dict[str, object], **more: object) -> bytes:
        usage = {"usage": self._usage()} if self._usage_always else {}
        return sse.event(self._chunk(choice, **more, **usage))

    def _usage(self) -> dict[str, object]:
        return usage_of(self._count.prompt, self._count.completion, self._count.cached)

    @staticmethod
    def _metadata(version: str) -> dict[str, object]:
        """As SGLang's answers have it."""
        return {"metadata": {"weight_version": version}}

    def _stop_reason(self, finish: Finish) -> int | str | None:
        """The stop string, or the id among those asked for, that ended a sample; None for the model's own end."""
        return finish.matched if isinstance(finish.matched, str) or finish.matched in self._stop_ids else None


def usage_of(prompt: int, completion: int, cached: int) -> dict[str, object]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage_of_samples(usages: list[Usage], n: int) -> dict[str, object]:
    """Of all samples; a prompt counts once for its n samples."""
    firsts = usages[::n]
    return usage_of(
        sum(usage.prompt_tokens for usage in firsts),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in firsts),
    )
