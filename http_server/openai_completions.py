"""`POST /v1/completions`: texts or token ids go on, without a chat template."""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.logprobs import CompletionLogprobs, join
from vibe_sgl_lite.http_server.openai_answer import OpenAIAnswer, usage_of, usage_of_samples
from vibe_sgl_lite.http_server.openai_types import IGNORED, REFUSED, CompletionBody
from vibe_sgl_lite.http_server.requests import (
    check_model,
    engine_options,
    make_sampling,
    sampling_values,
    several_prompts,
)
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, deliver, last_version
from vibe_sgl_lite.runtime.client.requests import plan_generate
from vibe_sgl_lite.runtime.messages import Chunk, Finish, unpack_ids

DEFAULT_TOKENS = 16  # OpenAI's own
MAX_PROMPTS = 1024


async def completions(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), CompletionBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    prompts = several_prompts(body.prompt, "prompt", MAX_PROMPTS)
    values = sampling_values(body)
    values["max_new_tokens"] = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if body.max_tokens == 0 and body.echo:
        values["max_new_tokens"] = 1  # computed, and not shown: the prompt alone was asked for
    if body.logprobs is not None:
        values |= {"logprobs": True, "top_logprobs": body.logprobs, "prompt_logprobs": bool(body.echo)}
    plan = plan_generate(
        prompts,
        make_sampling(values),
        input_ids=None,
        rid=None,
        options=engine_options(body),
        streamed=bool(body.stream),
    )
    echo = [await _Echo.of(service, prompt) for prompt in prompts] if body.echo or body.return_token_ids else None
    call = service.submit(exchange, plan.requests)
    answer = _Answer(service.model, body, call, echo)
    await deliver(exchange, call, answer, streamed=body.stream)


class _Echo(msgspec.Struct, frozen=True):
    """A prompt as it is shown again: its text, ids, and each id's text."""

    text: str
    ids: list[int]
    tokens: list[str]

    @classmethod
    async def of(cls, service: Service, prompt: str | list[int]) -> _Echo:
        ids = prompt if isinstance(prompt, list) else await service.encode(prompt, add_special_tokens=True)
        text = prompt if isinstance(prompt, str) else await service.decode(prompt)
        decode = partial(service.tokenizer.decode, skip_special_tokens=False)
        return cls(text, ids, await asyncio.to_thread(lambda: [decode([token_id]) for token_id in ids]))


class _Answer(OpenAIAnswer):
    ID, OBJECT = "cmpl", "text_completion"

    def __init__(self, model: str, body: CompletionBody, call: Call, echo: list[_Echo] | None) -> None:
        super().__init__(model, body, call)
        self._body, self._echo = body, echo
        self._only_prompt = body.max_tokens == 0 and bool(body.echo)
        self._logprobs = [CompletionLogprobs() for _ in range(call.running)]
        self._plain = not (self._usage_always or self._with_ids or self._only_prompt)
        self._texts = [
            sse.TextTemplate(self._chunk(self._choice(index, sse.TextTemplate.HOLE))) for index in range(call.running)
        ]

    @staticmethod
    def _choice(index: int, text: str, finish: str | None = None, **more: object) -> dict[str, object]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **more}

    def _echo_of(self, index: int) -> _Echo | None:
        return self._echo[index // self._call.n] if self._echo is not None else None

    # ------------------------------------------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        self._count.prompt = sum(self._call.prompt_tokens)
        if not self._body.echo or self._body.logprobs is not None:
            return b""  # with logprobs, the prompt comes with its own in the first chunk
        return b"".join(
            self._event(self._choice(i, echo.text)) for i in range(len(self._texts)) if (echo := self._echo_of(i))
        )

    def events(self, index: int, chunk: Chunk) -> bytes:
        self._count.add(chunk)
        if self._plain and chunk.finish is None and chunk.logprobs is None and chunk.prompt_logprobs is None:
            return self._texts[index].fill(chunk.text) if chunk.text else b""
        more: dict[str, object] = {}
        echo, text, parts = self._echo_of(index), "", []
        if chunk.prompt_logprobs is not None and echo is not None and self._body.echo:
            text = echo.text
            parts.append(self._logprobs[index].convert_prompt(chunk.prompt_logprobs, echo.text, echo.tokens))
        if not self._only_prompt:
            text += chunk.text
            if chunk.logprobs is not None:
                parts.append(self._logprobs[index].convert(chunk.logprobs))
        if parts:
            more["logprobs"] = join(parts)
        if self._with_ids:
            more["token_ids"] = [] if self._only_prompt else unpack_ids(chunk.token_ids)
            if echo is not None and chunk.first == 0:
                more["prompt_token_ids"] = echo.ids
        finish = chunk.finish
        if finish is None or finish.reason not in ("stop", "length"):
            return self._event(self._choice(index, text, None, **more)) if text or more else b""
        return self._event(self._end(index, text, finish, **more), **self._metadata(self._count.version))

    def _end(self, index: int, text: str, finish: Finish, **more: object) -> dict[str, object]:
        """Where the prompt alone was asked for, the token that was computed ended nothing that is shown."""
        if self._only_prompt:
            finish = Finish("length")
        return self._choice(index, text, finish.reason, stop_reason=self._stop_reason(finish), **more)

    def _usage(self) -> dict[str, object]:
        return usage_of(self._count.prompt, 0 if self._only_prompt else self._count.completion, self._count.cached)

    # --------------------------------------------------------------------------------------------------------- whole

    def whole(self, samples: list[Collected]) -> dict[str, object]:
        usage = usage_of_samples([sample.usage for sample in samples], self._call.n)
        if self._only_prompt:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        choices = [self._whole_choice(index, sample) for index, sample in enumerate(samples)]
        return {**self._head, "choices": choices, "usage": usage, **self._metadata(last_version(samples))}

    def _whole_choice(self, index: int, sample: Collected) -> dict[str, object]:
        echo = self._echo_of(index)
        text, parts = "", []
        more: dict[str, object] = {}
        if echo is not None and self._body.echo:
            text = echo.text
            if sample.prompt_logprobs:
                parts.append(self._logprobs[index].convert_prompt(sample.prompt_logprobs, echo.text, echo.tokens))
        if not self._only_prompt:
            text += sample.text
            if sample.logprobs:
                parts.append(self._logprobs[index].convert(sample.logprobs))
        if parts:
            more["logprobs"] = join(parts)
        if self._with_ids and echo is not None:
            more |= {"token_ids": [] if self._only_prompt else sample.token_ids, "prompt_token_ids": echo.ids}
        return self._end(index, text, sample.finish, **more)
