"""Instructions and input items of OpenAI's responses, as turns for the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vibe_sgl_lite.http_server.chat_messages import text_of
from vibe_sgl_lite.http_server.errors import ApiError, bad_request


def convert_items(instructions: str | None, items: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises ApiError naming the item. What the assistant thought, said and called in a row becomes one turn."""
    turns: list[dict[str, Any]] = []
    if instructions:
        turns.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*turns, {"role": "user", "content": items}]
    for place, item in enumerate(items):
        _add(turns, item, f"input[{place}]")
    return turns


def _add(turns: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise _bad(f"{where}.role is {role!r:.60}: must be user, assistant, system or developer")
        text = text_of(item.get("content"), f"{where}.content")
        if role == "assistant":
            turn = _assistant(turns)
            turn["content"] += text
        else:
            turns.append({"role": "system" if role == "developer" else role, "content": text})
    elif kind == "reasoning":
        text = _reasoning(item, "content", where) or _reasoning(item, "summary", where)
        turn = _assistant(turns)
        turn["reasoning_content"] = "\n".join(filter(None, [turn.get("reasoning_content"), text]))
    elif kind == "function_call":
        function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where) or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _assistant(turns).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = text_of(item.get("output"), f"{where}.output")
        turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    else:
        raise _bad(f"{where} is of type {kind!r:.60}, which is not supported")


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _reasoning(item: dict[str, Any], name: str, where: str) -> str:
    parts = item.get(name) or []
    if not (isinstance(parts, list) and all(isinstance(part, dict) for part in parts)):
        raise _bad(f"{where}.{name} must be a list of parts")
    return "\n".join(_string(part, "text", f"{where}.{name}[{place}]") for place, part in enumerate(parts))


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _bad(f"{where}.{name} must be a text")
    return value


def _bad(what: str) -> ApiError:
    return bad_request(what, "input")
