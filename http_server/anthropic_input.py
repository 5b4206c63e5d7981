"""System prompt and messages of Anthropic's API, as turns for the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vibe_sgl_lite.http_server.errors import ApiError, bad_request

# Claude Code's first system block: it differs in every request, and so would everything behind it in the cache.
BILLING = "x-anthropic-billing-header"


def convert_input(
    system: str | list[dict[str, Any]] | None, messages: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Raises ApiError naming the message."""
    turns: list[dict[str, Any]] = []
    if system is not None:
        text = system if isinstance(system, str) else _text(system, "system")
        if text:
            turns.append({"role": "system", "content": text})
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise _bad(where, f".role is {role!r:.60}: must be user or assistant")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise _bad(where, ".content must be a text or a list of blocks")
        turns += _assistant(blocks, where) if role == "assistant" else _others(role, blocks, where)
    return turns


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        match block.get("type"):
            case "text":
                turn["content"] += _string(block, "text", where)
            case "thinking":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + _string(block, "thinking", where)
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = msgspec.json.encode(block.get("input") or {}).decode()
                function = {"name": _string(block, "name", where), "arguments": arguments}
                turn.setdefault("tool_calls", []).append(
                    {"id": block.get("id"), "type": "function", "function": function}
                )
            case other:
                raise _bad(where, f" holds a block of type {other!r:.60}, which is not supported")
    return [turn]


def _others(role: str, blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Results of tools become turns of their own, before what the user says."""
    results: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            text = content if isinstance(content, str) else _text(content, where)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            texts.append(block)
    if texts or not results:
        results.append({"role": role, "content": _text(texts, where)})
    return results


def _text(blocks: object, where: str) -> str:
    if not isinstance(blocks, list):
        raise _bad(where, " must be a text or a list of blocks")
    texts = []
    for block in blocks:
        if not isinstance(block, dict) or block.get("type", "text") != "text":
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise _bad(where, f" holds a block of type {kind!r:.60}: this model reads text only")
        text = _string(block, "text", where)
        if not text.startswith(BILLING):
            texts.append(text)
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _bad(where, f" holds a block whose {name} is no text")
    return value


def _bad(where: str, what: str) -> ApiError:
    return bad_request(f"{where}{what}", where.split("[")[0])
