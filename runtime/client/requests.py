"""From the arguments of `generate`, `chat` and `stream` to encoded requests; the same for every kind of client.

Checks what a client can know: types, counts, sizes. The engine checks the rest, against model and tokenizer.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.client.outputs import Collector
from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.messages import MAX_FRAME_BYTES, Generate, check_fields, encode_request, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS, SamplingParams
from vibe_sgl_lite.runtime.settings.schema import hint, is_list, plain, shown

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Rid = str | Sequence[str] | None
Params = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]] | None

GENERATE_OPTIONS = ("priority", "cache_salt", "json_schema", "regex", "choice", "grammar")
CHAT_OPTIONS = (*GENERATE_OPTIONS, "enable_thinking", "max_thinking_tokens", "tools", "template_kwargs")


class ClientRequest(msgspec.Struct, frozen=True):
    """frame: the encoded message. n: samples it asks for."""

    message: Generate
    frame: bytes
    n: int = 1

    @property
    def rid(self) -> str:
        return self.message.rid


class Plan(msgspec.Struct, frozen=True):
    """What one call asks for. many: a list was passed, so a list is returned.

    outcome: what the caller gets of a request that has ended; it may raise. progress: told, in the caller's thread, how
    many requests have ended and of how many.
    """

    requests: list[ClientRequest]
    many: bool
    outcome: Callable[[Collector], Any] = Collector.result
    progress: Callable[[int, int], None] | None = None


def plan_generate(
    prompt: Prompt | Sequence[Prompt] | None,
    sampling_params: Params,
    *,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    rid: str | Sequence[str] | None,
    options: Mapping[str, Any],
    streamed: bool = False,
) -> Plan:
    """Requests of one `generate` call; options: see `Requests.generate`. Raises RequestError naming the argument."""
    shared, sampling = split(options, GENERATE_OPTIONS)
    if (prompt is None) == (input_ids is None):
        raise RequestError("give exactly one of prompt and input_ids", field="prompt")
    field = "prompt" if input_ids is None else "input_ids"
    given, many = several(prompt if input_ids is None else input_ids, field, texts=input_ids is None)
    requests = []
    for item, name, params in each(given, many, sampling_params, sampling, rid):
        text, ids = text_or_ids(item, field, texts=input_ids is None)
        requests.append(make_request(field, params, rid=name, prompt=text, input_ids=ids, streamed=streamed, **shared))
    return Plan(requests, many)


def plan_chat(
    messages: Messages | Sequence[Messages],
    sampling_params: Params,
    *,
    rid: str | Sequence[str] | None,
    options: Mapping[str, Any],
    streamed: bool = False,
) -> Plan:
    """Requests of one `chat` call; options: see `Requests.chat`. Raises RequestError naming the argument."""
    shared, sampling = split(options, CHAT_OPTIONS)
    if not is_list(messages) or len(messages) == 0:
        raise RequestError("messages must be a list of one or more messages, or a list of such lists", field="messages")
    many = not isinstance(messages[0], Mapping)
    requests = []
    for chat, name, params in each(messages if many else [messages], many, sampling_params, sampling, rid):
        if not is_list(chat) or not all(isinstance(m, Mapping) for m in chat):
            raise RequestError("messages: every message must be a dict with role and content", field="messages")
        turns = [dict(m) for m in chat]
        requests.append(make_request("messages", params, rid=name, messages=turns, streamed=streamed, **shared))
    return Plan(requests, many)


def single(plan: Plan) -> ClientRequest:
    """The one request of a stream. Raises RequestError for a list."""
    if plan.many:
        raise RequestError("a stream takes one prompt, not a list: open one stream for each", field="prompt")
    return plan.requests[0]


def with_payer(request: ClientRequest, payer: str) -> ClientRequest:
    """The same, for one of those whom the client serves."""
    message = msgspec.structs.replace(request.message, payer=payer)
    return msgspec.structs.replace(request, message=message, frame=encode_request(message))


def several(value: Any, field: str, *, texts: bool = True) -> tuple[Sequence[Any], bool]:
    """Prompts as a list of them, and whether they came as one. Raises RequestError."""
    given = plain(value)
    if not is_list(given) and not (texts and isinstance(given, str)):
        kinds = "a list of token ids, or a list of these"
        raise RequestError(f"{field} is a {type(given).__name__}: must be {'a text, ' * texts}{kinds}", field=field)
    if not texts and len(given) == 0:
        raise RequestError(f"{field} must hold at least one token id", field=field)
    many = not isinstance(given, str) and not _is_ids(given)
    return given if many else [given], many


def text_or_ids(item: Any, field: str, *, texts: bool = True) -> tuple[str | None, bytes | None]:
    """A prompt as `Generate` has it: one of `prompt` and `input_ids`. Raises RequestError."""
    if texts and isinstance(item, str):
        return str.__str__(item), None
    return None, _pack(plain(item), field, texts=texts)


def split(options: Mapping[str, Any], known: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `Generate` that all prompts of a call share, and sampling parameters that were passed by name."""
    sampling = {name: value for name, value in options.items() if name not in known}
    shared = {name: value for name, value in options.items() if name in known}
    aliases = {alias for field in FIELDS.values() for alias in (*field.spec.aliases, *field.spec.like)}
    for name in sampling:
        if name not in FIELDS and name not in aliases:
            told = hint(name, FIELDS) or f"there are {', '.join(known)}, and the sampling parameters"
            raise RequestError(f"{name} is no argument of this call; {told}", field=name)
    if (schema := shared.get("json_schema")) is not None and not isinstance(schema, str):
        if not isinstance(schema, Mapping):
            raise RequestError(
                f"json_schema is a {type(schema).__name__}: must be a dict or JSON text", field="json_schema"
            )
        try:
            shared["json_schema"] = json.dumps(schema, default=_json_value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"json_schema is no JSON: {error}", field="json_schema") from error
    shared["cache_salt"] = shared.get("cache_salt") or None
    if "tools" in known:
        shared["template_kwargs"] = _template_kwargs(shared) or None
    return shared, sampling


def _template_kwargs(shared: dict[str, Any]) -> dict[str, Any]:
    """What the chat template gets, taken out of `shared`."""
    kwargs, thinking = shared.pop("template_kwargs", None), plain(shared.pop("enable_thinking", None))
    tools = shared.pop("tools", None)
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
        raise RequestError("template_kwargs must be a dict of variables by name", field="template_kwargs")
    kwargs = dict(kwargs or {})
    if thinking is not None:
        if not isinstance(thinking, bool):
            raise RequestError(
                f"enable_thinking={shown(thinking)} must be True, False or None", field="enable_thinking"
            )
        kwargs["enable_thinking"] = thinking
    if tools is not None:
        if not is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError("tools must be a list of dicts", field="tools")
        if tools:
            kwargs["tools"] = list(tools)
    return kwargs


def each(
    prompts: Sequence[Any],
    many: bool,
    sampling_params: Params,
    changes: Mapping[str, Any],
    rid: str | Sequence[str] | None,
) -> zip[tuple[Any, str, SamplingParams]]:
    """Each prompt with its rid and sampling parameters; both may be one for all (a rid only when there is one)."""
    count = len(prompts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams | Mapping):
        params = [_sampling(sampling_params, changes)] * count
    else:
        given = sampling_params if is_list(sampling_params) else [sampling_params]  # which is refused
        params = [_sampling(one, changes) for one in given]
    rids: Any = (
        [secrets.token_hex(8) for _ in prompts] if rid is None else [rid] if isinstance(rid, str) else plain(rid)
    )
    if not is_list(rids):
        raise RequestError(f"rid={shown(rid)} must be a text, or a list of texts", field="rid")
    for field, entries in (("sampling_params", params), ("rid", rids)):
        if len(entries) != count:
            wanted = f"{count} prompts need {count}" if many else "one prompt needs one"
            raise RequestError(f"{field} has {len(entries)} entries, {wanted}", field=field)
    if any(not isinstance(name, str) or not name for name in rids) or len(set(rids)) != count:
        raise RequestError("every rid must be a text of its own, and not empty", field="rid")
    return zip(prompts, rids, params, strict=True)


def _sampling(params: Any, changes: Mapping[str, Any]) -> SamplingParams:
    if isinstance(params, SamplingParams):
        return SamplingParams(**{**params.to_dict(), **SamplingParams(**changes).to_dict()}) if changes else params
    if params is not None and not (isinstance(params, Mapping) and all(isinstance(name, str) for name in params)):
        raise RequestError(
            f"sampling_params={shown(params)} must be a SamplingParams, a dict of its fields, or a list of these",
            field="sampling_params",
        )
    base = SamplingParams(**(params or {}))
    return _sampling(base, changes) if changes else base


def _is_ids(value: Sequence[object]) -> bool:
    return is_list(value) and len(value) > 0 and isinstance(plain(value[0]), Integral)


def _pack(ids: Any, field: str, *, texts: bool) -> bytes:
    if not is_list(ids):
        raise RequestError(
            f"{field} holds a {type(ids).__name__}: every prompt must be a {'text or a ' * texts}list of token ids",
            field=field,
        )
    try:
        packed = pack_ids(ids)
    except (TypeError, OverflowError) as error:
        raise RequestError(f"{field} must hold token ids, whole numbers below 2**31: {error}", field=field) from error
    if len(ids) == 0 or min(ids) < 0:
        raise RequestError(f"{field} must hold at least one token id, and none below 0", field=field)
    return packed


def make_request(field: str, sampling: SamplingParams, **values: Any) -> ClientRequest:
    """field: what is sent, for errors. values: of `Generate`. Raises RequestError."""
    prompt = dict.fromkeys(("prompt", "input_ids", "messages"))
    message = Generate(sampling=msgspec.Raw(msgspec.msgpack.encode(sampling)), **{**prompt, **values})
    check_fields(message)
    try:
        frame = encode_request(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # ValueError: lone surrogates are no text
        raise RequestError(f"{field} cannot be sent: {error}", field=field) from error
    if len(frame) > MAX_FRAME_BYTES:
        raise RequestError(
            f"{field} makes a request of {len(frame)} bytes, at most {MAX_FRAME_BYTES} can be sent: shorten it",
            field=field,
        )
    return ClientRequest(message, frame, sampling.n if isinstance(sampling.n, int) else 1)


def _json_value(value: Any) -> Any:
    simple = plain(value)
    if simple is value:
        raise TypeError(f"it holds a {type(value).__name__}")
    return simple
