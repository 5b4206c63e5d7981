"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.chat_messages import convert_messages
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.errors import bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.logprobs import chat_logprobs
from vibe_sgl_lite.http_server.openai_answer import OpenAIAnswer, usage_of_samples
from vibe_sgl_lite.http_server.openai_types import IGNORED, REFUSED, ChatBody, NamedTool
from vibe_sgl_lite.http_server.requests import (
    check_model,
    engine_options,
    make_sampling,
    sampling_values,
)
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, deliver, last_version
from vibe_sgl_lite.http_server.tools import function_tool, read_calls, tool_options
from vibe_sgl_lite.runtime.client.requests import ClientRequest, plan_chat, single
from vibe_sgl_lite.runtime.messages import Chunk, Finish, unpack_ids

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


async def chat_completions(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), ChatBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    request = chat_request(body)
    prompt_ids = await service.chat_ids(request.messages, request.template) if body.return_token_ids else None
    call = service.submit(exchange, [request.engine])
    answer = _Answer(service.model, body, call, prompt_ids)
    await deliver(exchange, call, answer, streamed=body.stream)


class ChatRequest:
    """A chat as the engine gets it. template: variables of its template, the tools among them."""

    def __init__(self, engine: ClientRequest, messages: list[dict[str, Any]], template: dict[str, Any]) -> None:
        self.engine, self.messages, self.template = engine, messages, template


def chat_request(body: ChatBody) -> ChatRequest:
    """Raises ApiError and RequestError."""
    values = sampling_values(body)
    values["max_new_tokens"] = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.logprobs or body.top_logprobs:
        if not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    messages = convert_messages(body.messages)
    options = engine_options(body) | _tool_options(body)
    template = _template_variables(body)
    if body.continue_final_message and not (messages and messages[-1].get("role") == "assistant"):
        raise bad_request(
            "continue_final_message needs a last message of the assistant, to go on with", "continue_final_message"
        )
    options["template_kwargs"] = template
    if body.thinking_token_budget is not None:
        options["max_thinking_tokens"] = body.thinking_token_budget
    request = single(plan_chat(messages, make_sampling(values), rid=None, options=options, streamed=bool(body.stream)))
    tools = options.get("tools")
    return ChatRequest(request, messages, template | ({"tools": tools} if tools else {}))


def _template_variables(body: ChatBody) -> dict[str, Any]:
    kwargs = dict(body.chat_template_kwargs or {})
    for name in ("continue_final_message", "add_generation_prompt"):
        value = getattr(body, name)
        if value is not None:
            kwargs[name] = value
    if body.reasoning_effort is not None:
        if body.reasoning_effort not in EFFORTS:
            raise bad_request(
                f"reasoning_effort {body.reasoning_effort!r} must be one of {', '.join(EFFORTS)}", "reasoning_effort"
            )
        if body.reasoning_effort == "none":
            kwargs.setdefault("enable_thinking", False)
    if body.enable_thinking is not None:
        kwargs.setdefault("enable_thinking", body.enable_thinking)
    return kwargs


def _tool_options(body: ChatBody) -> dict[str, Any]:
    choice = body.tool_choice
    if choice == "none":
        return {}
    functions = [tool.function for tool in body.tools or []]
    tools = [function_tool(f.name, f.description, f.parameters, strict=f.strict) for f in functions]
    name = choice.function.name if isinstance(choice, NamedTool) else None
    forced = choice == "required" or name is not None
    if forced and body.response_format is not None and body.response_format.type != "text":
        raise bad_request("a forced tool call does not go with response_format", "tool_choice")
    return tool_options(tools, forced=forced, name=name, several=body.parallel_tool_calls is not False)


class _Answer(OpenAIAnswer):
    ID, OBJECT = "chatcmpl", "chat.completion.chunk"

    def __init__(self, model: str, body: ChatBody, call: Call, prompt_ids: list[int] | None) -> None:
        super().__init__(model, body, call)
        self._body, self._prompt_ids = body, prompt_ids
        self._with_reasoning = body.include_reasoning is not False
        self._calls = [0] * call.running  # tool calls of each sample so far
        self._texts = [self._template(i, {"content": sse.TextTemplate.HOLE}) for i in range(call.running)]
        hole = {"reasoning_content": sse.TextTemplate.HOLE, "reasoning": sse.TextTemplate.HOLE}
        self._reasonings = [self._template(i, hole) for i in range(call.running)]
        self._plain = not (self._usage_always or self._with_ids)

    def _template(self, index: int, delta: Mapping[str, object]) -> sse.TextTemplate:
        return sse.TextTemplate(self._chunk(self._choice(index, delta)))

    @staticmethod
    def _choice(index: int, delta: Mapping[str, object], **more: object) -> dict[str, object]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}

    # ------------------------------------------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        self._count.prompt = sum(self._call.prompt_tokens)
        more = {} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids}
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(self._choice(i, delta), **more) for i in range(len(self._calls)))

    def events(self, index: int, chunk: Chunk) -> bytes:
        self._count.add(chunk)
        if self._plain and chunk.finish is None and chunk.logprobs is None and not chunk.tool_calls:
            parts = b""
            if chunk.reasoning and self._with_reasoning:
                parts = self._reasonings[index].fill(chunk.reasoning)
            return parts + self._texts[index].fill(chunk.text) if chunk.text else parts
        return self._full_event(index, chunk)

    def _full_event(self, index: int, chunk: Chunk) -> bytes:
        delta: dict[str, object] = {}
        if chunk.reasoning and self._with_reasoning:
            delta |= {"reasoning_content": chunk.reasoning, "reasoning": chunk.reasoning}
        if chunk.text:
            delta["content"] = chunk.text
        calls = self._tool_calls(index, chunk)
        if calls:
            delta["tool_calls"] = calls
        more: dict[str, object] = {}
        if self._with_ids:
            more["token_ids"] = unpack_ids(chunk.token_ids)
        if chunk.logprobs is not None:
            more["logprobs"] = chat_logprobs(chunk.logprobs)
        data = b""
        if delta or more:
            data = self._event(self._choice(index, delta, **more))
        if chunk.finish is not None and chunk.finish.reason in ("stop", "length"):
            reason = self._finish_reason(chunk.finish, self._calls[index])
            end = self._choice(index, {}, finish_reason=reason, stop_reason=self._stop_reason(chunk.finish))
            data += self._event(end, **self._metadata(self._count.version))
        return data

    def _tool_calls(self, index: int, chunk: Chunk) -> list[dict[str, object]]:
        new = []
        for call in read_calls(chunk.tool_calls):
            if self._calls[index] and self._body.parallel_tool_calls is False:
                break
            function = {"name": call.name, "arguments": call.arguments}
            new.append({"index": self._calls[index], "id": call.id, "type": "function", "function": function})
            self._calls[index] += 1
        return new

    # --------------------------------------------------------------------------------------------------------- whole

    def whole(self, samples: list[Collected]) -> dict[str, object]:
        more = {} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(index, sample) for index, sample in enumerate(samples)],
            "usage": usage_of_samples([sample.usage for sample in samples], len(samples)),
            **self._metadata(last_version(samples)),
            **more,
        }

    def _whole_choice(self, index: int, sample: Collected) -> dict[str, object]:
        calls = read_calls(sample.tool_calls)
        if self._body.parallel_tool_calls is False:
            calls = calls[:1]
        message: dict[str, object] = {"role": "assistant", "content": sample.text or (None if calls else "")}
        message["refusal"] = None
        if self._with_reasoning:
            message |= {"reasoning_content": sample.reasoning or None, "reasoning": sample.reasoning or None}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        choice: dict[str, object] = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(sample.logprobs) if self._body.logprobs else None,
            "finish_reason": self._finish_reason(sample.finish, len(calls)),
            "stop_reason": self._stop_reason(sample.finish),
        }
        return choice | ({"token_ids": sample.token_ids} if self._with_ids else {})

    @staticmethod
    def _finish_reason(finish: Finish, calls: int) -> str:
        return "tool_calls" if calls and finish.reason == "stop" else finish.reason
