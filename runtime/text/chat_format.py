"""How Qwen3's chat format marks reasoning and tool calls in a text, and what a tool call is.

The engine marks (detokenizer) and constrains (ranks) by this; clients read tool calls by it. Knows no streams.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import msgspec

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TOOL_OPEN, TOOL_CLOSE = "<tool_call>", "</tool_call>"
# How templates write the end of a thinking block: what is forced when its budget is spent.
THINK_CLOSE_LINES = f"\n{THINK_CLOSE}\n\n"
# A JSON text, or as much of it as there is, or the closing tag outside of any.
_TEXT_OR_CLOSE = re.compile(r'"(?:[^"\\]|\\.)*+"?|' + re.escape(TOOL_CLOSE), re.DOTALL)


class ToolCall(msgspec.Struct, frozen=True):
    """A function that the model wants called. raw: the JSON text between the tags, as the model wrote it."""

    name: str
    arguments: dict[str, Any]
    raw: str


def find_call_end(text: str) -> int | None:
    """Where the closing tag of a call begins, in the text after its opening tag; None if it has not come.

    A tag within a JSON text, of the call's arguments, does not close the call.
    """
    return next((found.start() for found in _TEXT_OR_CLOSE.finditer(text) if found[0] == TOOL_CLOSE), None)


def parse_tool_call(raw: str) -> ToolCall | None:
    """The call that `raw` describes: a JSON object with a name and an object of arguments. None when it does not.

    Some models say `parameters` for `arguments`, the word of the tools' own descriptions.
    """
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments, raw)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
