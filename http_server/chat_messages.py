"""Messages as OpenAI's API has them, turned into what the chat template takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vibe_sgl_lite.http_server.errors import ApiError, bad_request

KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
PART_TYPES = ("text", "input_text", "output_text", "refusal")


def convert_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developer turns become system turns, lists of text parts one text. Raises ApiError naming the message."""
    return [_convert(message, place) for place, message in enumerate(messages)]


def _convert(message: dict[str, Any], place: int) -> dict[str, Any]:
    turn = {key: message[key] for key in KEPT if message.get(key) is not None}
    if turn.get("role") == "developer":
        turn["role"] = "system"
    if "reasoning" in turn:
        turn.setdefault("reasoning_content", turn["reasoning"])  # the name that templates read
    if "content" in turn:
        turn["content"] = text_of(turn["content"], f"messages[{place}].content")
    elif turn.get("role") == "assistant" and (turn.get("tool_calls") or "reasoning_content" in turn):
        turn["content"] = ""
    return turn


def text_of(content: object, where: str) -> str:
    """A text, or the texts of a list of text parts, joined by line breaks. Raises ApiError for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(where, f"is a {type(content).__name__}: must be a text or a list of text parts")
    return "\n".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _bad(where, f"is a {type(part).__name__}: must be an object with type and text")
    kind = part.get("type", "text")
    if kind not in PART_TYPES:
        raise _bad(where, f"has type {kind!r:.60}: this model reads text only")
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise _bad(where, "has no text")
    return text


def _bad(where: str, what: str) -> ApiError:
    return bad_request(f"{where} {what}", where.split("[")[0])
