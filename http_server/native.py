"""SGLang's own endpoints, for programs that work with token ids: `/generate` and what goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.chat_messages import convert_messages
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError, bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, deliver
from vibe_sgl_lite.runtime.client.outputs import weight_spans
from vibe_sgl_lite.runtime.client.requests import plan_generate
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import Chunk, Finish, LogprobEntry
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

GRAMMARS = ("json_schema", "regex", "choice", "grammar")
RENAMED = {"no_stop_trim": "include_stop", "sampling_seed": "seed"}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "spaces_between_special_tokens": (True, None),
    "ebnf": (None,),
    "structural_tag": (None,),
    "custom_params": (None,),
    "stream_interval": (None, 1),
}
REFUSED: dict[str, tuple[object, ...]] = {
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "input_embeds": (),
    "lora_path": (),
    "token_ids_logprob": (),
    "return_hidden_states": (),
    "session_params": (),
    "custom_logit_processor": (),
    "bootstrap_host": (),
    "return_routed_experts": (),
    "logprob_start_len": (-1, 0),
}
IGNORED = frozenset({"log_metrics", "return_text_in_logprobs", "background", "conversation_id", "extra_key"})


class GenerateBody(msgspec.Struct, kw_only=True):
    """`POST /generate`. sampling_params: one for all prompts, or one each, under our names (docs/sampling.md)."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | list[int] | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a text, or a chat as the model's template has it."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class AbortBody(msgspec.Struct, kw_only=True):
    """`POST /abort_request`."""

    rid: str | None = None
    abort_all: bool | None = None


async def generate(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), GenerateBody, REFUSED, IGNORED)
    if isinstance(body.return_logprob, list) or isinstance(body.top_logprobs_num, list):
        raise bad_request("return_logprob and top_logprobs_num must be one value for all prompts", "return_logprob")
    if body.logprob_start_len not in (None, -1, 0):
        raise bad_request(
            f"logprob_start_len={body.logprob_start_len}: must be 0 (the whole prompt) or -1 (none of it)",
            "logprob_start_len",
        )
    prompt = body.text if body.text is not None else body.input_ids
    if (body.text is None) == (body.input_ids is None) or not prompt:
        raise bad_request("give exactly one of text and input_ids, and not an empty one", "text")
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    given = body.sampling_params or {}
    params, options = _sampling(given[0] if isinstance(given, list) else given, body)
    if isinstance(given, list):
        pairs = [_sampling(one, body) for one in given]
        if any(other != options for _, other in pairs):
            raise bad_request("what constrains the output must be the same for all prompts", "sampling_params")
    options |= {key: value for key in ("priority", "cache_salt") if (value := getattr(body, key)) is not None}
    plan = plan_generate(
        body.text,
        [one for one, _ in pairs] if isinstance(given, list) else params,
        input_ids=cast(Sequence[int] | None, body.input_ids),  # or several of these: checked there
        rid=body.rid,
        options=options,
        streamed=bool(body.stream),
    )
    if isinstance(given, list) and len({request.n for request in plan.requests}) > 1:
        raise bad_request("n must be the same for all prompts", "sampling_params")
    call = service.submit(exchange, plan.requests, keep_aborted=True)
    answer = _Answer(call, many or call.n > 1, bool(body.return_logprob))
    await deliver(exchange, call, answer, streamed=body.stream)


def _sampling(given: dict[str, Any], body: GenerateBody) -> tuple[SamplingParams, dict[str, Any]]:
    """Sampling parameters, and what constrains the output. Raises ApiError and RequestError."""
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise bad_request(f"sampling_params.{name} is not supported: leave it out", name)
        elif value is not None:
            (options if name in GRAMMARS else values)[RENAMED.get(name, name)] = value
    if body.return_logprob:
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs_num or 0}
        values["prompt_logprobs"] = body.logprob_start_len == 0
    return SamplingParams(**values), options


class _Answer:
    """many: a list is answered. Each event of a stream holds all that came so far, as SGLang's do."""

    def __init__(self, call: Call, many: bool, logprobs: bool) -> None:
        self._call, self._many, self._logprobs = call, many, logprobs
        self._samples = [Collected() for _ in range(call.running)]

    def events(self, index: int, chunk: Chunk) -> bytes:
        self._samples[index].add(chunk)
        value = self._value(index, self._samples[index])
        return sse.event(value | {"index": index} if self._many else value)

    def opening(self) -> bytes:
        return b""

    def closing(self) -> bytes:
        return sse.DONE

    def failure(self, error: ApiError) -> bytes:
        return sse.event(error.openai())

    def whole(self, samples: Sequence[Collected]) -> object:
        values = [self._value(index, sample) for index, sample in enumerate(samples)]
        return values if self._many else values[0]

    def _value(self, index: int, sample: Collected) -> dict[str, object]:
        request = index // self._call.n
        meta: dict[str, object] = {
            "id": self._call.requests[request].rid,
            "finish_reason": _finish(sample.finish, len(sample.token_ids)),
            "prompt_tokens": self._call.prompt_tokens[request],
            "completion_tokens": len(sample.token_ids),
            "cached_tokens": sample.usage.cached_tokens,
            "e2e_latency": self._call.times.last - self._call.times.began,
            "weight_version": sample.versions[-1][1] if sample.versions else None,
            "weight_versions": [span.to_dict() for span in weight_spans(sample.versions, len(sample.token_ids))],
        }
        if self._logprobs:
            meta["output_token_logprobs"] = [_triple(entry) for entry in sample.logprobs]
            meta["output_top_logprobs"] = [[_triple(top) for top in entry.top] for entry in sample.logprobs]
            meta["input_token_logprobs"] = [_triple(entry) for entry in sample.prompt_logprobs]
            meta["input_top_logprobs"] = [
                None if entry is None else [_triple(top) for top in entry.top] for entry in sample.prompt_logprobs
            ]
        return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": meta}


def _triple(entry: LogprobEntry | None) -> list[object]:
    return [None, None, None] if entry is None else [entry.logprob, entry.token_id, entry.text]


def _finish(finish: Finish, tokens: int) -> dict[str, object] | None:
    if finish.reason == "length":
        return {"type": "length", "length": tokens}
    if finish.reason == "abort":
        return {"type": "abort", "message": "it was aborted before its end"}
    return {"type": "stop", "matched": finish.matched} if finish.reason == "stop" else None


async def tokenize(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), TokenizeBody, {}, ())
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give exactly one of prompt and messages", "prompt")
    if body.messages is not None:
        template: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if body.add_generation_prompt is not None:
            template["add_generation_prompt"] = body.add_generation_prompt
        if body.tools:
            template["tools"] = body.tools
        ids = await service.chat_ids(convert_messages(body.messages), template)
    else:
        ids = await service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    answer: dict[str, object] = {"count": len(ids), "max_model_len": service.spec.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token(token_id) for token_id in ids]
    await exchange.answer_json(answer)


async def detokenize(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), DetokenizeBody, {}, ())
    size = service.spec.model.vocab_size
    wrong = next((token_id for token_id in body.tokens if not 0 <= token_id < size), None)
    if wrong is not None:
        raise bad_request(f"tokens holds {wrong}, which is outside the vocabulary, 0..{size - 1}", "tokens")
    text = await service.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    await exchange.answer_json({"prompt": text, "text": text})


async def abort_request(service: Service, exchange: Exchange) -> None:
    """Ends requests that came over HTTP, to whichever worker; what runs gets its end as always."""
    body = service.bodies.read(await exchange.body(), AbortBody, {}, ())
    if not body.rid and not body.abort_all:
        raise bad_request("give rid, or abort_all: true", "rid")
    service.engine.abort(body.rid or "")
    await exchange.answer_json({"success": True})


async def flush_cache(service: Service, exchange: Exchange) -> None:
    try:
        values = await service.engine.query("flush_cache")
    except VibeError as error:
        raise ApiError(400, str(error), code="flush_refused") from error
    await exchange.answer_json({"success": True, "flushed_pages": values.get("flushed_pages", 0)})
