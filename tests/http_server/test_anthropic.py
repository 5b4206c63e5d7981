"""`/v1/messages` through the anthropic client, compared with our own client's answers of the same engine."""

from __future__ import annotations

import re
from typing import Any

import anthropic
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite import SamplingParams

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
THINK: Any = {"type": "enabled", "budget_tokens": 1024}
COLD = {"temperature": 0}  # a field that newer clients have no name for
GREEDY = SamplingParams(max_new_tokens=100, temperature=0)


def test_a_whole_answer(server: Server, claude: Any) -> None:
    with server.client() as ours:
        plain = ours.chat(QUESTION, GREEDY, enable_thinking=False)
        thinking = ours.chat(QUESTION, GREEDY)
    answer = claude.messages.create(model="tiny", max_tokens=100, messages=QUESTION, extra_body=COLD)
    assert [(block.type, block.text) for block in answer.content] == [("text", plain.text)]
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "end_turn", None)
    assert plain.usage is not None
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == plain.usage.prompt_tokens
    assert usage.output_tokens == plain.usage.completion_tokens
    thought = claude.messages.create(model="tiny", max_tokens=2000, messages=QUESTION, extra_body=COLD, thinking=THINK)
    assert [block.type for block in thought.content] == ["thinking", "text"]
    assert thought.content[0].thinking == thinking.reasoning
    assert thought.content[1].text == thinking.text


def test_a_stream_has_the_events_in_order(server: Server, claude: Any) -> None:
    options: Any = {"model": "tiny", "max_tokens": 2000, "messages": QUESTION, "extra_body": COLD, "thinking": THINK}
    whole = claude.messages.create(**options)
    names: list[str] = []
    for event in claude.messages.create(**options, stream=True):
        if not names or names[-1] != event.type:
            names.append(event.type)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]
    with claude.messages.stream(**options) as stream:
        final = stream.get_final_message()
    assert [block.model_dump() for block in final.content] == [block.model_dump() for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == 18


def test_stop_sequences_and_length(claude: Any) -> None:
    story: Any = [{"role": "user", "content": "Tell me a story."}]
    answer = claude.messages.create(model="tiny", max_tokens=5, messages=story, extra_body=COLD)
    assert answer.stop_reason == "max_tokens"
    first = answer.content[0].text.split()[1]
    answer = claude.messages.create(
        model="tiny", max_tokens=50, messages=story, extra_body=COLD, stop_sequences=[first]
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", first)


def test_a_conversation_with_tools_counts_like_openais(server: Server, claude: Any) -> None:
    """The same chat in both forms is the same prompt."""
    conversation: Any = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Weather in Rome?", "cache_control": {"type": "ephemeral"}}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A tool knows.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And Oslo?"},
            ],
        },
    ]
    counted = claude.messages.count_tokens(
        model="tiny",
        messages=conversation,
        tools=[WEATHER],
        system=[{"type": "text", "text": "x-anthropic-billing-header: 77"}, {"type": "text", "text": "Be brief."}],
    )
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    function = {"name": "get_weather", "parameters": WEATHER["input_schema"], "description": WEATHER["description"]}
    openai_form = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": "I look.", "reasoning_content": "A tool knows.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
            {"role": "user", "content": "And Oslo?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "reasoning_effort": "none",
        "max_tokens": 1,
    }
    assert counted.input_tokens == server.post("/v1/chat/completions", openai_form).json["usage"]["prompt_tokens"]
    answer = claude.messages.create(
        model="tiny", messages=conversation, tools=[WEATHER], system="Be brief.", max_tokens=5, extra_body=COLD
    )
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == counted.input_tokens


def test_errors_have_anthropics_form(server: Server, claude: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="tiny", max_tokens=0, messages=QUESTION)
    assert caught.value.body["type"] == "error"  # type: ignore[index]
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert "max_tokens" in str(caught.value)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=5, messages=QUESTION)
    for bad in (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"mcp_servers": [{"name": "x"}]},
        {"tool_choice": {"type": "any"}},
    ):
        body = {"model": "tiny", "max_tokens": 5, "messages": QUESTION} | bad
        reply = server.post("/v1/messages", body)
        assert reply.status == 400, reply.data
        assert reply.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_too_much_is_told_in_words_that_coding_agents_know(server: Server, stream: bool) -> None:
    """This API's errors have no code: its clients compact their context, or ask for less, on Anthropic's own words."""
    long = [{"role": "user", "content": "again and " * 40_000}]
    body = {"messages": long, "max_tokens": 10, "stream": stream}
    reply = server.post("/v1/messages", body)
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")
    assert re.match(r"prompt is too long: \d+ tokens > 32768 maximum", reply.json["error"]["message"])
    reply = server.post("/v1/messages", body | {"messages": QUESTION, "max_tokens": 32_768})
    tokens = server.post("/v1/messages/count_tokens", {"messages": QUESTION}).json["input_tokens"]
    assert reply.status == 400
    told = f"input length and `max_tokens` exceed context limit: {tokens} + 32768 > 32768"
    assert reply.json["error"]["message"].startswith(told)


def test_a_forced_call_whole_and_streamed(claude: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    options: Any = {
        "model": "tiny",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "tools": [{"name": "set_unit", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "set_unit"},
    }
    answer = claude.messages.create(**options)
    assert [block.type for block in answer.content] == ["tool_use"]
    assert answer.content[0].name == "set_unit"
    assert answer.content[0].input["unit"] in ("C", "F")
    assert answer.stop_reason == "tool_use"
    with claude.messages.stream(**options) as stream:
        final = stream.get_final_message()
    assert final.content[0].input["unit"] in ("C", "F")
    assert final.stop_reason == "tool_use"
