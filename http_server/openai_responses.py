"""`POST /v1/responses`, stateless: nothing is stored, the whole conversation comes with each request."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any, Literal

import msgspec

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.blocks import Added, Block, BlockAnswer, BlockEvent, Opened
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import ApiError, bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.openai_chat import EFFORTS
from vibe_sgl_lite.http_server.requests import JSON_OBJECT, check_model, make_sampling, new_id
from vibe_sgl_lite.http_server.responses_input import convert_items
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, deliver
from vibe_sgl_lite.http_server.tools import function_tool, tool_options
from vibe_sgl_lite.runtime.client.requests import ClientRequest, plan_chat, single

log = logging.getLogger(__name__)


class ResponseTool(msgspec.Struct):
    """Tools of other types than function are run by OpenAI: they are not offered to the model."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct):
    type: Literal["function"]
    name: str


class Reasoning(msgspec.Struct):
    effort: str | None = None


class TextFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """`POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None


REFUSED: dict[str, tuple[object, ...]] = {
    "background": (),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
IGNORED = frozenset(
    {
        "client_metadata",
        "include",
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)


async def responses(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), ResponsesBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    call = service.submit(exchange, [_request(body)])
    answer = _Answer(service.model, body, call)
    await deliver(exchange, call, answer, streamed=body.stream)


def _request(body: ResponsesBody) -> ClientRequest:
    """Raises ApiError and RequestError."""
    values: dict[str, Any] = {"max_new_tokens": body.max_output_tokens}
    if body.temperature is not None:
        values["temperature"] = body.temperature
    if body.top_p is not None:
        values["top_p"] = body.top_p
    options: dict[str, Any] = {}
    effort = body.reasoning.effort if body.reasoning is not None else None
    if effort is not None and effort not in EFFORTS:
        raise bad_request(f"reasoning.effort {effort!r} must be one of {', '.join(EFFORTS)}", "reasoning")
    if effort == "none":
        options["enable_thinking"] = False
    form = body.text.format if body.text is not None else None
    if form is not None and form.type != "text":
        if form.type == "json_schema" and form.schema is None:
            raise bad_request("text.format.schema is missing", "text")
        options["json_schema"] = JSON_OBJECT if form.type == "json_object" else form.schema
    options |= _tool_options(body)
    turns = convert_items(body.instructions, body.input)
    return single(plan_chat(turns, make_sampling(values), rid=None, options=options, streamed=bool(body.stream)))


def _tool_options(body: ResponsesBody) -> dict[str, Any]:
    choice, tools = body.tool_choice, []
    if choice == "none":
        return {}
    for tool in body.tools or []:
        if tool.type != "function" or tool.name is None:
            log.info("a tool of type %.40r is not offered to the model", tool.type)
        else:
            tools.append(function_tool(tool.name, tool.description, tool.parameters))
    name = choice.name if isinstance(choice, ResponseToolChoice) else None
    forced = choice == "required" or name is not None
    return tool_options(tools, forced=forced, name=name, several=body.parallel_tool_calls is not False)


class _Answer(BlockAnswer):
    def __init__(self, model: str, body: ResponsesBody, call: Call) -> None:
        super().__init__(call, one_call=body.parallel_tool_calls is False)
        self._body, self._model = body, model
        self._id = new_id("resp")
        self._created = int(time.time())
        self._ids: list[str] = []  # of the blocks
        self._number = 0  # of the next event

    # --------------------------------------------------------------------------------------------------------- whole

    def whole(self, samples: list[Collected]) -> dict[str, object]:
        self._add_all(samples[0])
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self._finish.reason == "length" else "completed"

    def _response(self, status: str, error: ApiError | None = None) -> dict[str, object]:
        body = self._body
        choice = msgspec.to_builtins(body.tool_choice) if body.tool_choice is not None else "auto"
        tools = [
            {
                "type": "function",
                "name": t.name,
                "description": t.description,
                "parameters": t.parameters,
                "strict": t.strict,
            }
            for t in body.tools or []
            if t.type == "function"
        ]
        ended = status != "in_progress"
        output = [self._item(block, "completed" if ended else "in_progress") for block in self._blocks.done]
        form = body.text.format if body.text is not None else None
        shown = (
            {"type": "text"} if form is None else {k: v for k, v in msgspec.to_builtins(form).items() if v is not None}
        )
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": shown},
            "tool_choice": choice,
            "tools": tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, object]:
        count = self._count
        return {
            "input_tokens": count.prompt,
            "input_tokens_details": {"cached_tokens": count.cached, "cache_write_tokens": 0},
            "output_tokens": count.completion,
            "output_tokens_details": {"reasoning_tokens": self._blocks.thinking_tokens},
            "total_tokens": count.prompt + count.completion,
        }

    def _item(self, block: Block, status: str, *, empty: bool = False) -> dict[str, object]:
        while len(self._ids) <= block.index:
            self._ids.append(secrets.token_hex(12))
        name = self._ids[block.index]
        if block.kind == "call":
            assert block.call is not None
            return {
                "type": "function_call",
                "id": f"fc_{name}",
                "call_id": block.call.id,
                "name": block.call.name,
                "arguments": "" if empty else block.text,
                "status": status,
            }
        content = [] if empty else [_part(block.kind, block.text)]
        if block.kind == "thinking":
            return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content, "status": status}
        return {"type": "message", "id": f"msg_{name}", "role": "assistant", "status": status, "content": content}

    # ------------------------------------------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        self._count.prompt = self._call.prompt_tokens[0]
        response = self._response("in_progress")
        return self._send("response.created", response=response) + self._send("response.in_progress", response=response)

    def closing(self) -> bytes:
        status = self._status()
        return self._send(f"response.{status}", response=self._response(status))

    def failure(self, error: ApiError) -> bytes:
        return self._send("response.failed", response=self._response("failed", error))

    def _send(self, kind: str, **fields: object) -> bytes:
        self._number += 1
        return sse.event({"type": kind, **fields, "sequence_number": self._number - 1}, kind)

    def _event(self, event: BlockEvent) -> bytes:
        block = event.block
        item = self._item(block, "in_progress", empty=True)
        place: dict[str, object] = {"output_index": block.index, "item_id": item["id"]}
        kind = {
            "thinking": "response.reasoning_text",
            "text": "response.output_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        inner: dict[str, object] = {} if block.kind == "call" else {"content_index": 0}
        logprobs: dict[str, object] = {"logprobs": []} if block.kind == "text" else {}
        match event:
            case Opened():
                delta = {"type": f"{kind}.delta", **place, **inner, **logprobs, "delta": sse.TextTemplate.HOLE}
                self._delta = sse.TextTemplate(delta | {"sequence_number": sse.TextTemplate.NUMBER}, f"{kind}.delta")
                data = self._send("response.output_item.added", output_index=block.index, item=item)
                if block.kind != "call":
                    data += self._send("response.content_part.added", **place, **inner, part=_part(block.kind, ""))
                return data
            case Added(text=text):
                assert self._delta is not None
                self._number += 1
                return self._delta.numbered(self._number - 1).fill(text)
        done = {"arguments": block.text, "name": block.call.name} if block.call is not None else {"text": block.text}
        data = self._send(f"{kind}.done", **place, **inner, **logprobs, **done)
        if block.kind != "call":
            data += self._send("response.content_part.done", **place, **inner, part=_part(block.kind, block.text))
        return data + self._send(
            "response.output_item.done", output_index=block.index, item=self._item(block, "completed")
        )


def _part(kind: str, text: str) -> dict[str, object]:
    if kind == "thinking":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
