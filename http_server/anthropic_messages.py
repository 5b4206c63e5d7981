"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, which coding agents speak."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.anthropic_input import convert_input
from vibe_sgl_lite.http_server.blocks import Added, Block, BlockAnswer, BlockEvent, Opened
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError, bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.requests import check_model, make_sampling
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, deliver
from vibe_sgl_lite.http_server.tools import function_tool, tool_options
from vibe_sgl_lite.runtime.client.requests import ClientRequest, plan_chat, single
from vibe_sgl_lite.runtime.messages import Finish


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """effort: taken, and changes nothing."""

    effort: str | None = None
    format: OutputFormat | None = None


class ToolDefinition(msgspec.Struct):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_config: OutputConfig | None = None


REFUSED: dict[str, tuple[object, ...]] = {
    "container": (),
    "mcp_servers": (),
    "output_format": (),
}
IGNORED = frozenset(
    {
        "metadata",
        "service_tier",
        "cache_control",
        "context_management",
        "betas",
        "diagnostics",
        "inference_geo",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)


async def messages(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), MessagesBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    call = service.submit(exchange, [_request(body)])
    answer = _Answer(service.model, body, call)
    await deliver(exchange, call, answer, streamed=body.stream)


async def count_tokens(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), CountBody, REFUSED, IGNORED | set(MessagesBody.__struct_fields__))
    check_model(body.model, service.model)
    template: dict[str, Any] = {"enable_thinking": _thinks(body)}
    tools = _tools(body)
    ids = await service.chat_ids(
        convert_input(body.system, body.messages), template | ({"tools": tools} if tools else {})
    )
    await exchange.answer_json({"input_tokens": len(ids)})


def _request(body: MessagesBody) -> ClientRequest:
    """Raises ApiError and RequestError."""
    values: dict[str, Any] = {"max_new_tokens": body.max_tokens}
    for theirs, ours in (("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")):
        value = getattr(body, theirs)
        if value is not None:
            values[ours] = value
    if body.stop_sequences:
        values["stop"] = body.stop_sequences
    options: dict[str, Any] = {"enable_thinking": _thinks(body)}
    if body.thinking is not None and body.thinking.type == "enabled" and body.thinking.budget_tokens is not None:
        options["max_thinking_tokens"] = body.thinking.budget_tokens
    choice = body.tool_choice
    forced = choice is not None and choice.type in ("any", "tool")
    name = choice.name if choice is not None and choice.type == "tool" else None
    if choice is not None and choice.type == "tool" and name is None:
        raise bad_request("tool_choice of type tool needs a name", "tool_choice")
    options |= tool_options(_tools(body), forced=forced, name=name, several=not _one_call(body))
    if not forced and body.output_config is not None and body.output_config.format is not None:
        options["json_schema"] = body.output_config.format.schema
    turns = convert_input(body.system, body.messages)
    return single(plan_chat(turns, make_sampling(values), rid=None, options=options, streamed=bool(body.stream)))


def _thinks(body: CountBody) -> bool:
    """As in that API, nothing thinks unless it is asked to."""
    return body.thinking is not None and body.thinking.type != "disabled"


def _one_call(body: CountBody) -> bool:
    return bool(body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use)


def _tools(body: CountBody) -> list[dict[str, Any]]:
    if body.tool_choice is not None and body.tool_choice.type == "none":
        return []
    shown = []
    for tool in body.tools or []:
        if tool.type not in (None, "custom"):
            raise bad_request(f"tools: {tool.name!r} is of type {tool.type!r}, which only Anthropic runs", "tools")
        shown.append(function_tool(tool.name, tool.description, tool.input_schema or {"type": "object"}))
    return shown


class _Answer(BlockAnswer):
    def __init__(self, model: str, body: MessagesBody, call: Call) -> None:
        super().__init__(call, one_call=_one_call(body), with_thinking=_thinks(body))
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def whole(self, samples: list[Collected]) -> dict[str, object]:
        self._add_all(samples[0])
        return {
            **self._head,
            "content": [_content(block) for block in self._blocks.done],
            **_stop(self._finish, self._blocks.calls),
            "usage": self._usage(),
        }

    def opening(self) -> bytes:
        self._count.prompt = self._call.prompt_tokens[0]
        start: dict[str, object] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        return sse.event({"type": "message_start", "message": start}, "message_start")

    def _event(self, event: BlockEvent) -> bytes:
        block = event.block
        match event:
            case Opened():
                kind, field = {
                    "thinking": ("thinking_delta", "thinking"),
                    "text": ("text_delta", "text"),
                    "call": ("input_json_delta", "partial_json"),
                }[block.kind]
                delta = {"type": kind, field: sse.TextTemplate.HOLE}
                name = "content_block_delta"
                self._delta = sse.TextTemplate({"type": name, "index": block.index, "delta": delta}, name)
                name = "content_block_start"
                empty = _content(Block(block.index, block.kind, "", block.call))
                return sse.event({"type": name, "index": block.index, "content_block": empty}, name)
            case Added(text=text):
                assert self._delta is not None
                return self._delta.fill(text)
        name = "content_block_stop"
        return sse.event({"type": name, "index": block.index}, name)

    def closing(self) -> bytes:
        stop = _stop(self._finish, self._blocks.calls)
        delta = {"type": "message_delta", "delta": stop, "usage": self._usage()}
        return sse.event(delta, "message_delta") + sse.event({"type": "message_stop"}, "message_stop")

    def failure(self, error: ApiError) -> bytes:
        return sse.event(error.anthropic(), "error")

    def _usage(self) -> dict[str, object]:
        """There, input_tokens are those that were computed."""
        count = self._count
        return {
            "input_tokens": count.prompt - count.cached,
            "output_tokens": count.completion,
            "cache_read_input_tokens": count.cached,
            "cache_creation_input_tokens": 0,
        }


def _content(block: Block) -> dict[str, object]:
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text, "citations": None}
    assert block.call is not None
    arguments = msgspec.json.decode(block.text) if block.text else {}
    return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": arguments}


def _stop(finish: Finish, calls: int) -> dict[str, object]:
    if finish.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(finish.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
