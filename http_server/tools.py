"""Tools of a request, and a grammar that makes the model call one of them.

The grammar is written in Lark's syntax as llguidance reads it: the tags are the model's own tokens (it has never seen
them spelled otherwise, and would call the wrong tool), the JSON around a call is a fixed text, its arguments follow the
tool's own schema.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vibe_sgl_lite.http_server.errors import bad_request
from vibe_sgl_lite.runtime.text.chat_format import TOOL_CLOSE, TOOL_OPEN, parse_tool_call

Schema = Mapping[str, Any]
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def function_tool(name: str, description: str | None, parameters: Schema | None, **more: object) -> dict[str, Any]:
    """A tool as chat templates take it."""
    function = {"name": name, "description": description, "parameters": parameters, **more}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def tool_options(tools: Sequence[dict[str, Any]], *, forced: bool, name: str | None, several: bool) -> dict[str, Any]:
    """Keywords of the client's `chat`: the tools, and with `forced` a grammar of calls, of `name` or of any of them.

    several: one or more calls, unless `name` is given. Raises ApiError for a tool that there is not.
    """
    if not forced:
        return {"tools": tools} if tools else {}
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    return {"tools": tools, "grammar": calls_grammar(schemas, name, several=several and name is None)}


def calls_grammar(schemas: Mapping[str, Schema | None], name: str | None, *, several: bool) -> str:
    """A grammar of one call, or with `several` of one or more, of the tool `name` or of any.

    schemas: of the arguments, by tool. Raises ApiError for a tool that there is not.
    """
    if not schemas:
        raise bad_request("tool_choice asks for a call, and tools has none", "tool_choice")
    if name is not None and name not in schemas:
        raise bad_request(f"tool_choice names {name!r}, which is not among tools", "tool_choice")
    chosen = {name: schemas[name]} if name is not None else schemas
    rules = ['start: call ("\\n" call)*' if several else "start: call"]
    closing = f'"}}\\n" {TOOL_CLOSE}'
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(chosen))))
    for i, (tool, schema) in enumerate(chosen.items()):
        opening = f'\n{{"name": {_json(tool)}, "arguments": '
        rules.append(f"call_{i}: {TOOL_OPEN} {_json(opening)} arguments_{i} {closing}")
        rules.append(f"arguments_{i}: %json {_json(_object_schema(schema))}")
    return "\n".join(rules) + "\n"


def _object_schema(schema: Schema | None) -> dict[str, Any]:
    return {"type": "object", **(schema or {}), "x-guidance": JSON_OPTIONS}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class CallText(msgspec.Struct, frozen=True):
    """A call as clients want it: an id of its own, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str


def read_calls(raws: Sequence[str]) -> list[CallText]:
    """raws: `Chunk.tool_calls`."""
    calls = []
    for raw in raws:
        call = parse_tool_call(raw)
        assert call is not None, "the engine sends only what can be parsed"
        calls.append(CallText(f"call_{secrets.token_hex(12)}", call.name, _json(call.arguments)))
    return calls
