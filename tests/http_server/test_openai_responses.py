"""`/v1/responses` through the openai client, compared with our own client's answers of the same engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite import SamplingParams

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
GREEDY = SamplingParams(max_new_tokens=100, temperature=0)


def test_a_whole_answer(server: Server, client: Any) -> None:
    with server.client() as ours:
        expected = ours.chat(QUESTION, GREEDY)
    for given in (
        "What is 17 + 25?",
        QUESTION,
        [{"role": "user", "content": [{"type": "input_text", "text": "What is 17 + 25?"}]}],
    ):
        answer = client.responses.create(model="tiny", input=given, temperature=0)
        assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output[0].content[0].text == expected.reasoning
        assert answer.output_text == expected.text
        assert expected.usage is not None
        assert answer.usage.input_tokens == expected.usage.prompt_tokens
        assert answer.usage.output_tokens == expected.usage.completion_tokens
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


def test_a_stream_tells_the_same_in_order(client: Any) -> None:
    whole = client.responses.create(model="tiny", input=QUESTION, temperature=0)
    events = list(client.responses.create(model="tiny", input=QUESTION, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    order = [name for place, name in enumerate(names) if not place or names[place - 1] != name]
    inside = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    expected = ["created", "in_progress"]
    expected += [name.format("reasoning_text") for name in inside] + [name.format("output_text") for name in inside]
    assert order == [*expected, "completed"]
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {item.id for item in final.output}


def test_a_length_makes_it_incomplete(client: Any) -> None:
    answer = client.responses.create(model="tiny", input="Tell me a story.", max_output_tokens=5)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = client.responses.create(model="tiny", input="Tell me a story.", max_output_tokens=5, stream=True)
    assert last.type == "response.incomplete"


def test_a_conversation_is_the_prompt_that_chats_have(server: Server, client: Any) -> None:
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    answer = client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": "Weather in Rome?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
        tools=[{"type": "function", "strict": None, **tool}],
        max_output_tokens=5,
    )
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": "", "reasoning": "Ask.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        "tools": [{"type": "function", "function": tool}],
        "max_tokens": 5,
    }
    usage = server.post("/v1/chat/completions", chat).json["usage"]
    assert answer.usage.input_tokens == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 16 - 1  # the same pages


def test_structured_text(client: Any) -> None:
    schema = {"enum": ["yes", "no"]}
    answer = client.responses.create(
        model="tiny",
        input="Say.",
        reasoning={"effort": "none"},
        text={"format": {"type": "json_schema", "name": "x", "schema": schema}},
    )
    assert answer.output_text in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": None}]}, "input"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text"}]}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_what_is_refused(client: Any, extra: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "x"} | extra)
    assert caught.value.param == param


def test_a_forced_call(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    options: Any = {
        "model": "tiny",
        "input": "Tell me a story.",
        "tools": [{"type": "function", "name": "set_unit", "parameters": schema, "strict": True}],
        "tool_choice": {"type": "function", "name": "set_unit"},
        "reasoning": {"effort": "none"},
    }
    answer = client.responses.create(**options)
    assert [(item.type, item.name) for item in answer.output] == [("function_call", "set_unit")]
    assert json.loads(answer.output[0].arguments)["unit"] in ("C", "F")
    events = list(client.responses.create(**options, stream=True))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert json.loads(done.arguments)["unit"] in ("C", "F")
    assert events[-1].response.output[0].arguments == done.arguments
