"""From the arguments of `generate`, `chat` and `stream` to encoded requests; the same for every kind of client.

Checks what a client can know: types, counts, sizes. The engine checks the rest, against model and tokenizer.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict

import msgspec

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.messages import MAX_FRAME_BYTES, Generate, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

MAX_PRIORITY = 2**31 - 1


class GenerateOptions(TypedDict, total=False):
    """Keywords of every call; they hold for all its prompts.

    priority: higher goes first where the engine runs with `--schedule-policy priority` (0).
    cache_salt: only requests with the same salt share cached prefixes (none).
    json_schema (a dict or JSON text), regex, choice (a list of texts), grammar (Lark's syntax): the output, after a
    thinking block, is exactly that: a JSON document that validates, a full match, one of the texts, what the grammar
    describes. At most one of them. They need the `grammar` extra where the engine runs.
    """

    priority: int
    cache_salt: str | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None


class ChatOptions(GenerateOptions, total=False):
    """Keywords of chats.

    enable_thinking: passed to the chat template; None leaves its default.
    max_thinking_tokens: a thinking block is closed after so many tokens (no limit).
    tools: functions that the model may call, as dicts for the chat template (OpenAI's form); calls come as
    `tool_calls`.
    template_kwargs: other variables of the chat template, `continue_final_message` and `add_generation_prompt` too.
    """

    enable_thinking: bool | None
    max_thinking_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None


class Request(msgspec.Struct, frozen=True):
    """frame: the encoded `Generate`. n: samples it asks for."""

    rid: str
    frame: bytes
    n: int = 1


class Plan(msgspec.Struct, frozen=True):
    """What one call asks for. many: a list was passed, so a list is returned."""

    requests: list[Request]
    many: bool


def plan_generate(
    prompt: Prompt | Sequence[Prompt] | None,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    rid: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> Plan:
    """Requests of one `generate` call; options: `GenerateOptions`. Raises RequestError naming the argument."""
    shared = _shared(options, GenerateOptions)
    if (prompt is None) == (input_ids is None):
        raise RequestError("give exactly one of prompt and input_ids", field="prompt")
    if prompt is not None:
        field, given = "prompt", prompt
        if not (isinstance(prompt, str) or _is_list(prompt)):
            raise RequestError(
                f"prompt is a {type(prompt).__name__}: must be a text, a list of token ids, or a list of these",
                field="prompt",
            )
        many = not isinstance(prompt, str) and not _is_ids(prompt)
    else:
        assert input_ids is not None
        field, given = "input_ids", input_ids
        if not _is_list(input_ids) or len(input_ids) == 0:
            raise RequestError(
                "input_ids must be a list of one or more token ids, or a list of such lists", field="input_ids"
            )
        many = not _is_ids(input_ids)
    prompts: list[Any] = list(given) if many else [given]
    params, rids = _per_prompt(len(prompts), many, sampling_params, rid)
    requests = []
    for item, sampling, name in zip(prompts, params, rids, strict=True):
        text = item if field == "prompt" and isinstance(item, str) else None
        ids = None if text is not None else _pack(item, field)
        requests.append(_request(name, sampling, shared, prompt=text, input_ids=ids))
    return Plan(requests, many)


def plan_chat(
    messages: Messages | Sequence[Messages],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    rid: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> Plan:
    """Requests of one `chat` call; options: `ChatOptions`. Raises RequestError naming the argument."""
    shared = _shared(options, ChatOptions) | _template_fields(options)
    if not _is_list(messages) or len(messages) == 0:
        raise RequestError("messages must be a list of one or more messages, or a list of such lists", field="messages")
    many = not isinstance(messages[0], Mapping)
    chats: list[Any] = list(messages) if many else [messages]
    params, rids = _per_prompt(len(chats), many, sampling_params, rid)
    requests = []
    for chat, sampling, name in zip(chats, params, rids, strict=True):
        if not _is_list(chat) or not all(isinstance(m, Mapping) for m in chat):
            raise RequestError("messages: every message must be a dict with role and content", field="messages")
        turns = [dict(m) for m in chat]
        requests.append(_request(name, sampling, shared, messages=turns))
    return Plan(requests, many)


def single(plan: Plan) -> Request:
    """The one request of a stream. Raises RequestError for a list."""
    if plan.many:
        raise RequestError("a stream takes one prompt, not a list: open one stream for each", field="prompt")
    return plan.requests[0]


def _shared(options: Mapping[str, Any], known: type[GenerateOptions]) -> dict[str, Any]:
    """Fields of `Generate` that all prompts of a call share."""
    for name in options:
        if name not in known.__annotations__:
            raise RequestError(f"{name} is no argument of this call", field=name)
    priority, cache_salt = options.get("priority", 0), options.get("cache_salt")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority={priority!r} must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}", field="priority"
        )
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt={cache_salt!r} must be a text or None", field="cache_salt")
    return {"priority": priority, "cache_salt": cache_salt, **_grammar_fields(options)}


def _grammar_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    schema, choice = options.get("json_schema"), options.get("choice")
    if schema is not None and not isinstance(schema, str):
        if not isinstance(schema, Mapping):
            raise RequestError(
                f"json_schema is a {type(schema).__name__}: must be a dict or JSON text", field="json_schema"
            )
        try:
            schema = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"json_schema is no JSON: {error}", field="json_schema") from error
    texts = {name: options.get(name) for name in ("regex", "grammar")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name}={value!r} must be a text", field=name)
    if choice is not None:
        if not _is_list(choice) or not all(isinstance(text, str) for text in choice):
            raise RequestError(f"choice={choice!r:.100} must be a list of texts", field="choice")
        choice = list(choice)
    return {"json_schema": schema, "choice": choice, **texts}


def _template_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    thinking, budget, tools = (options.get(name) for name in ("enable_thinking", "max_thinking_tokens", "tools"))
    if thinking is not None and not isinstance(thinking, bool):
        raise RequestError(f"enable_thinking={thinking!r} must be True, False or None", field="enable_thinking")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget < 2**31):
        raise RequestError(
            f"max_thinking_tokens={budget!r} must be a whole number of 0 or more", field="max_thinking_tokens"
        )
    given = options.get("template_kwargs")
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise RequestError("template_kwargs must be a dict of variables by name", field="template_kwargs")
    kwargs: dict[str, Any] = dict(given or {})
    if thinking is not None:
        kwargs["enable_thinking"] = thinking
    if tools is not None:
        if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError("tools must be a list of dicts", field="tools")
        if tools:
            kwargs["tools"] = list(tools)
    return {"template_kwargs": kwargs or None, "max_thinking_tokens": budget}


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_ids(value: Sequence[object]) -> bool:
    return _is_list(value) and len(value) > 0 and isinstance(value[0], Integral)


def _pack(ids: Any, field: str) -> bytes:
    if not _is_list(ids):
        raise RequestError(
            f"{field} holds a {type(ids).__name__}: every prompt must be a {'text or a ' if field == 'prompt' else ''}"
            "list of token ids",
            field=field,
        )
    try:
        packed = pack_ids(ids)
    except (TypeError, OverflowError) as error:
        raise RequestError(f"{field} must hold token ids, whole numbers below 2**31: {error}", field=field) from error
    if len(ids) == 0 or min(ids) < 0:
        raise RequestError(f"{field} must hold at least one token id, and none below 0", field=field)
    return packed


def _per_prompt(
    count: int,
    many: bool,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    rid: str | Sequence[str] | None,
) -> tuple[list[SamplingParams], list[str]]:
    """Sampling parameters and rid of each prompt; both may be one for all (a rid only when there is one prompt)."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params = [sampling_params or SamplingParams()] * count
    elif isinstance(sampling_params, Sequence) and all(isinstance(p, SamplingParams) for p in sampling_params):
        params = list(sampling_params)
    else:
        raise RequestError("sampling_params must be a SamplingParams or a list of them", field="sampling_params")
    if rid is None:
        rids = [secrets.token_hex(8) for _ in range(count)]
    elif isinstance(rid, str):
        rids = [rid]
    else:
        rids = list(rid)
    for field, given in (("sampling_params", params), ("rid", rids)):
        if len(given) != count:
            wanted = f"{count} prompts need {count}" if many else "one prompt needs one"
            raise RequestError(f"{field} has {len(given)} entries, {wanted}", field=field)
    if any(not isinstance(name, str) or not name for name in rids) or len(set(rids)) != count:
        raise RequestError("every rid must be a text of its own, and not empty", field="rid")
    return params, rids


def _request(
    rid: str,
    sampling: SamplingParams,
    shared: Mapping[str, Any],
    *,
    prompt: str | None = None,
    input_ids: bytes | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> Request:
    message = Generate(
        rid=rid,
        prompt=prompt,
        input_ids=input_ids,
        messages=messages,
        sampling=msgspec.Raw(msgspec.msgpack.encode(sampling)),
        **shared,
    )
    field = "messages" if messages is not None else "prompt" if prompt is not None else "input_ids"
    try:
        frame = msgspec.msgpack.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # ValueError: lone surrogates are no text
        raise RequestError(f"{field} cannot be sent: {error}", field=field) from error
    if len(frame) > MAX_FRAME_BYTES:
        raise RequestError(
            f"{field} makes a request of {len(frame)} bytes, at most {MAX_FRAME_BYTES} can be sent: shorten it",
            field=field,
        )
    return Request(rid, frame, sampling.n if isinstance(sampling.n, int) else 1)
