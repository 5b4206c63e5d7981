"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, which coding agents speak."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.anthropic_input import convert_input
from vibe_sgl_lite.http_server.blocks import Added, Block, BlockEvent, Blocks, Opened, blocks_of
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.requests import check_model, make_sampling
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, UsageCounter, collect, stream
from vibe_sgl_lite.http_server.tools import calls_grammar
from vibe_sgl_lite.runtime.client.requests import ClientRequest, plan_chat, single
from vibe_sgl_lite.runtime.messages import Chunk, Finish, Usage


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
    if body.stream:
        await stream(
            exchange,
            call,
            opening=answer.opening,
            events=answer.events,
            closing=answer.closing,
            failure=lambda error: sse.event(error.anthropic(), "error"),
        )
    else:
        await exchange.answer_json(answer.whole((await collect(exchange, call))[0]))


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
    tools, choice = _tools(body), body.tool_choice
    if tools:
        options["tools"] = tools
    if choice is not None and choice.type in ("any", "tool"):
        if choice.type == "tool" and choice.name is None:
            raise bad_request("tool_choice of type tool needs a name", "tool_choice")
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        several = choice.type == "any" and not choice.disable_parallel_tool_use
        options["grammar"] = calls_grammar(schemas, choice.name, several=several)
    elif body.output_config is not None and body.output_config.format is not None:
        options["json_schema"] = body.output_config.format.schema
    turns = convert_input(body.system, body.messages)
    return single(plan_chat(turns, make_sampling(values), rid=None, options=options))


def _thinks(body: CountBody) -> bool:
    """As in that API, nothing thinks unless it is asked to."""
    return body.thinking is not None and body.thinking.type != "disabled"


def _tools(body: CountBody) -> list[dict[str, Any]]:
    if body.tool_choice is not None and body.tool_choice.type == "none":
        return []
    shown = []
    for tool in body.tools or []:
        if tool.type not in (None, "custom"):
            raise bad_request(f"tools: {tool.name!r} is of type {tool.type!r}, which only Anthropic runs", "tools")
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema or {"type": "object"}
        shown.append({"type": "function", "function": function})
    return shown


class _Answer:
    """What is sent for one request, whole or in pieces."""

    def __init__(self, model: str, body: MessagesBody, call: Call) -> None:
        self._call = call
        one = bool(body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use)
        self._options = {"one_call": one, "with_thinking": _thinks(body)}
        self._blocks = Blocks(**self._options)
        self._count = UsageCounter(0)
        self._finish = Finish("error")
        self._delta: sse.TextTemplate | None = None  # of the open block
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def whole(self, sample: Collected) -> dict[str, object]:
        blocks = blocks_of(sample, **self._options)
        return {
            **self._head,
            "content": [_content(block) for block in blocks.done],
            **_stop(sample.finish, blocks.calls),
            "usage": _usage(sample.usage),
        }

    def opening(self) -> bytes:
        self._count.prompt = self._call.prompt_tokens[0]
        start: dict[str, object] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(self._count.prompt, 0)),
        }
        return sse.event({"type": "message_start", "message": start}, "message_start")

    def events(self, index: int, chunk: Chunk) -> bytes:
        self._count.add(chunk)
        self._finish = chunk.finish or self._finish
        return b"".join([self._event(event) for event in self._blocks.add(chunk)])

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
        usage = _usage(Usage(self._count.prompt, self._count.completion, self._count.cached))
        delta = {"type": "message_delta", "delta": _stop(self._finish, self._blocks.calls), "usage": usage}
        return sse.event(delta, "message_delta") + sse.event({"type": "message_stop"}, "message_stop")


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


def _usage(usage: Usage) -> dict[str, object]:
    """There, input_tokens are those that were computed."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }
