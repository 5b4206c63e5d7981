"""From the fields of a body to sampling parameters and the engine's requests. Checks what the engine cannot name."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from vibe_sgl_lite.http_server.errors import ApiError, bad_request
from vibe_sgl_lite.http_server.openai_types import CommonBody
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS, SamplingParams

JSON_OBJECT = {"type": "object"}
# A body's field -> the sampling parameter of that name or alias; max_tokens aside, which chats call otherwise too.
SAMPLING = {
    theirs: ours
    for ours, field in FIELDS.items()
    for theirs in (ours, *field.spec.aliases)
    if theirs in CommonBody.__struct_fields__ and theirs != "max_tokens"
}


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def check_model(asked: str | None, served: str) -> None:
    """Raises ApiError (404). No name is the model that there is."""
    if asked is not None and asked != served:
        raise ApiError(
            404,
            f"the model {asked!r} does not exist; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def several_prompts(prompt: str | list[Any], field: str, most: int) -> list[Any]:
    """Texts, or lists of ids, where one of either may come alone. Raises ApiError."""
    if not prompt:
        raise bad_request(f"{field} is empty: give a text, token ids, or a list of these", field)
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise bad_request(f"{field} mixes texts, token ids and lists of these: give one kind", field)
    if kinds == {int}:
        return [prompt]
    if len(prompt) > most:
        raise bad_request(f"{field} has {len(prompt)} entries: at most {most}", field)
    if not all(prompt):
        raise bad_request(f"{field} holds an empty one: each must have at least one token", field)
    return list(prompt)


def sampling_values(body: CommonBody) -> dict[str, Any]:
    """Keywords of `SamplingParams` for what is set, `max_new_tokens` and logprobs aside."""
    return {ours: value for theirs, ours in SAMPLING.items() if (value := getattr(body, theirs)) not in (None, [])}


def make_sampling(values: Mapping[str, Any]) -> SamplingParams:
    """Raises RequestError."""
    return SamplingParams(**values)


def engine_options(body: CommonBody) -> dict[str, Any]:
    """Keywords of the client's calls: priority, cache_salt, and what the output must match. Raises ApiError."""
    options: dict[str, Any] = {}
    if body.priority is not None:
        options["priority"] = body.priority
    if body.cache_salt is not None:
        options["cache_salt"] = body.cache_salt
    constraints = _constraints(body)
    if len(constraints) > 1:
        raise bad_request(
            f"give one of response_format, structured_outputs and regex, not {len(constraints)} at once",
            "structured_outputs",
        )
    return options | (constraints[0] if constraints else {})


def _constraints(body: CommonBody) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append({"json_schema": JSON_OBJECT})
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise bad_request("response_format.json_schema.schema is missing", "response_format")
        found.append({"json_schema": _schema(form.json_schema.schema)})
    if body.regex is not None:
        found.append({"regex": body.regex})
    asked = body.structured_outputs
    if asked is not None:
        if asked.json_object:
            found.append({"json_schema": JSON_OBJECT})
        if asked.json is not None:
            found.append({"json_schema": _schema(asked.json)})
        for name in ("regex", "choice", "grammar"):
            value = getattr(asked, name)
            if value is not None:
                found.append({name: value})
    return found


def _schema(schema: dict[str, Any] | bool | str) -> str:
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
