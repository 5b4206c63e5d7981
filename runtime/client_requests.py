"""From the arguments of `generate`, `chat` and `stream` to encoded requests; the same for every kind of client.

Checks what a client can know: types, counts, sizes. The engine checks the rest, against model and tokenizer.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import msgspec

from runtime.errors import RequestError
from runtime.messages import MAX_FRAME_BYTES, Generate, pack_ids
from runtime.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

MAX_PRIORITY = 2**31 - 1
# Keywords whose work is not in yet: refused by name.
NOT_YET = ("tools", "json_schema", "regex", "choice", "max_thinking_tokens")


class Request(msgspec.Struct, frozen=True):
    """frame: the encoded `Generate`."""

    rid: str
    frame: bytes


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
    priority: int,
    cache_salt: str | None,
    later: Mapping[str, object],
) -> Plan:
    """Requests of one `generate` call. Raises RequestError naming the argument."""
    _refuse(later)
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
        requests.append(_request(name, sampling, priority, cache_salt, prompt=text, input_ids=ids))
    return Plan(requests, many)


def plan_chat(
    messages: Messages | Sequence[Messages],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    enable_thinking: bool | None,
    rid: str | Sequence[str] | None,
    priority: int,
    cache_salt: str | None,
    later: Mapping[str, object],
) -> Plan:
    """Requests of one `chat` call. Raises RequestError naming the argument."""
    _refuse(later)
    if enable_thinking is not None and not isinstance(enable_thinking, bool):
        raise RequestError(f"enable_thinking={enable_thinking!r} must be True, False or None", field="enable_thinking")
    if not _is_list(messages) or len(messages) == 0:
        raise RequestError("messages must be a list of one or more messages, or a list of such lists", field="messages")
    many = not isinstance(messages[0], Mapping)
    chats: list[Any] = list(messages) if many else [messages]
    params, rids = _per_prompt(len(chats), many, sampling_params, rid)
    kwargs = None if enable_thinking is None else {"enable_thinking": enable_thinking}
    requests = []
    for chat, sampling, name in zip(chats, params, rids, strict=True):
        if not _is_list(chat) or not all(isinstance(m, Mapping) for m in chat):
            raise RequestError("messages: every message must be a dict with role and content", field="messages")
        turns = [dict(m) for m in chat]
        requests.append(_request(name, sampling, priority, cache_salt, messages=turns, template_kwargs=kwargs))
    return Plan(requests, many)


def single(plan: Plan) -> Request:
    """The one request of a stream. Raises RequestError for a list."""
    if plan.many:
        raise RequestError("a stream takes one prompt, not a list: open one stream for each", field="prompt")
    return plan.requests[0]


def _refuse(later: Mapping[str, object]) -> None:
    for name, value in later.items():
        if name not in NOT_YET:
            raise RequestError(f"{name} is no argument of this call", field=name)
        if value is not None:
            raise RequestError(f"{name} is not supported yet; leave it out", field=name)


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
    priority: int,
    cache_salt: str | None,
    *,
    prompt: str | None = None,
    input_ids: bytes | None = None,
    messages: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Request:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority={priority!r} must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}", field="priority"
        )
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt={cache_salt!r} must be a text or None", field="cache_salt")
    message = Generate(
        rid=rid,
        prompt=prompt,
        input_ids=input_ids,
        messages=messages,
        sampling=msgspec.Raw(msgspec.msgpack.encode(sampling)),
        priority=priority,
        cache_salt=cache_salt,
        template_kwargs=template_kwargs,
    )
    field = "messages" if messages is not None else "prompt" if prompt is not None else "input_ids"
    try:
        frame = msgspec.msgpack.encode(message)
    except (TypeError, ValueError, OverflowError) as error:  # ValueError: lone surrogates are no text
        raise RequestError(f"{field} cannot be sent: {error}", field=field) from error
    if len(frame) > MAX_FRAME_BYTES:
        raise RequestError(
            f"{field} makes a request of {len(frame)} bytes, at most {MAX_FRAME_BYTES} can be sent: shorten it",
            field=field,
        )
    return Request(rid, frame)
