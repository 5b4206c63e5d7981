"""`/v1/chat/completions` through the openai client, compared with our own client's answers of the same engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from tests.http_server.server import Server
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.http_server.chat_messages import convert_messages

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
GREEDY = SamplingParams(max_new_tokens=100, temperature=0)


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> tuple[str, str, str | None]:
    """(reasoning, text, finish reason) of one sample."""
    reasoning = text = ""
    finish = None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                text += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                finish = choice.finish_reason or finish
    return reasoning, text, finish


def test_a_whole_answer_is_that_of_our_own_client(server: Server, client: Any) -> None:
    with server.client() as ours:
        expected = ours.chat(QUESTION, GREEDY)
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=100)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.message.reasoning_content == choice.message.reasoning == expected.reasoning
    assert expected.reasoning
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert expected.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    assert answer.usage.total_tokens == expected.usage.prompt_tokens + expected.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16  # the page that the first request left


def test_a_stream_joins_to_the_whole(server: Server, client: Any) -> None:
    with server.client() as ours:
        expected = ours.chat(QUESTION, GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            temperature=0,
            max_completion_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert joined(chunks) == (expected.reasoning, expected.text, "stop")
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    first, last = chunks[0], chunks[-1]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert last.choices == []
    assert last.usage is not None
    assert expected.usage is not None
    assert last.usage.completion_tokens == expected.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done_and_has_no_usage_unasked(server: Server) -> None:
    reply = server.post("/v1/chat/completions", {"messages": QUESTION, "stream": True, "max_tokens": 5})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.events[-1] == "[DONE]"
    assert not [event for event in reply.events[:-1] if "usage" in event]
    assert reply.events[-2]["choices"][0]["finish_reason"] == "length"
    assert b"keep-alive" not in reply.data


def test_continuous_usage_counts_up(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = server.post(
        "/v1/chat/completions", {"messages": QUESTION, "stream": True, "max_tokens": 8, "stream_options": options}
    )
    counts = [event["usage"]["completion_tokens"] for event in reply.events[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert all(event["usage"]["prompt_tokens"] == 18 for event in reply.events[:-1])


def test_samples_differ_and_are_numbered(client: Any) -> None:
    def ask(**more: Any) -> Any:
        story: Any = [{"role": "user", "content": "Tell me a story."}]
        asked = {"n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 20, "reasoning_effort": "none"} | more
        return client.chat.completions.create(model="tiny", messages=story, **asked)

    ask()  # the next ones find all of the prompt in the cache: bits of bf16 depend on what is computed together
    answer = ask()
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = list(ask(stream=True))
    assert [joined(chunks, index)[1] for index in range(3)] == texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        20 if choice.finish_reason == "length" else answer.usage.completion_tokens - 40 for choice in answer.choices
    )


def test_effort_none_and_template_variables_switch_thinking_off(client: Any) -> None:
    for extra in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        answer = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            temperature=0,
            max_tokens=50,
            **extra,
        )
        assert answer.choices[0].message.content == "42"
        assert answer.choices[0].message.reasoning is None


def test_content_parts_developer_role_and_both_reasoning_names(server: Server) -> None:
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "Easy."},
        {"role": "user", "content": "And\nmore?"},
    ]
    other = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "What is 1 + 1?", "name": None},
        {"role": "assistant", "content": "2", "reasoning": "Easy."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "more?"}]},
    ]
    ids = [
        server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "return_token_ids": True}).json[
            "prompt_token_ids"
        ]
        for messages in (plain, other)
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 20


def test_templates_get_reasoning_under_the_name_that_they_read() -> None:
    """Whether or not the template library renames it too."""
    turns = [{"role": "assistant", "content": "2", "reasoning": "Easy."}]
    assert convert_messages(turns)[0]["reasoning_content"] == "Easy."
    turns[0]["reasoning_content"] = "Hard."
    assert convert_messages(turns)[0]["reasoning_content"] == "Hard."


@pytest.mark.parametrize("content", ["I look.", None])
def test_reasoning_of_a_step_with_tools_goes_back_under_both_names(server: Server, content: str | None) -> None:
    """There templates show it. A turn that has nothing else need not have a content either."""
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    prompts = []
    for name in ("reasoning_content", "reasoning"):
        turn = {"role": "assistant", "content": content, name: "A tool knows."}
        for history in ([turn], [turn | {"tool_calls": calls}, {"role": "tool", "content": "2"}]):
            body = {"messages": [*QUESTION, *history], "max_tokens": 1, "return_token_ids": True}
            ids = server.post("/v1/chat/completions", body).json["prompt_token_ids"]
            prompts.append(server.post("/detokenize", {"tokens": ids}).json["text"])
    assert prompts[:2] == prompts[2:]
    assert all("<think>\nA tool knows.\n</think>" in prompt for prompt in prompts)


def test_returned_ids_are_what_ran(server: Server) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 100, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", body).json
    with server.client() as ours:
        expected = ours.chat(QUESTION, GREEDY)
        again = ours.generate(input_ids=answer["prompt_token_ids"], sampling_params=GREEDY)
    assert answer["choices"][0]["token_ids"] == expected.token_ids == again.token_ids
    streamed = server.post("/v1/chat/completions", body | {"stream": True}).events[:-1]
    assert streamed[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    ids = [token for event in streamed for token in event["choices"][0].get("token_ids", [])]
    assert ids == expected.token_ids


def test_logprobs(server: Server, client: Any) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=0, top_logprobs=2)
    with server.client() as ours:
        expected = ours.chat(QUESTION, params).logprobs
    assert expected is not None
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=10, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert [entry.token for entry in content] == [entry.text for entry in expected]
    assert [entry.logprob for entry in content] == pytest.approx([entry.logprob for entry in expected], abs=0.05)
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert bytes(content[0].bytes or []).decode() == content[0].token
    streamed = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=10, logprobs=True, top_logprobs=2, stream=True
    )
    tokens = [
        entry.token
        for chunk in streamed
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert tokens == [entry.text for entry in expected]


def test_stop_strings_and_what_matched(server: Server) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 50, "stop": "make", "stream_options": None}
    choice = server.post("/v1/chat/completions", body).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "make"
    assert "make" not in choice["message"]["reasoning"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_id_that_ended_it_is_told_if_it_was_asked_for(server: Server, stream: bool) -> None:
    """Of the model's own end there is nothing to tell."""
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 100, "return_token_ids": True, "stream": stream}
    for asked in (False, True):
        reply = server.post("/v1/chat/completions", body)
        choices = [event["choices"][0] for event in reply.events[:-1]] if stream else reply.json["choices"]
        ids = [token for choice in choices for token in choice.get("token_ids", [])]
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["stop_reason"] == (ids[-1] if asked else None)
        body["stop_token_ids"] = [ids[5]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_forced_call(client: Any, choice: object, stream: bool) -> None:
    """At a temperature that has the model ramble: the grammar alone makes it a call."""
    other = {"type": "function", "function": {"name": "other"}}
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "tools": [WEATHER] if choice == "required" else [WEATHER, other],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
        "reasoning_effort": "none",
    }
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        calls = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
        assert calls[0].index == 0
        assert calls[0].id.startswith("call_")
        assert joined(chunks)[1] == ""
    else:
        answer = client.chat.completions.create(**options)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        calls = answer.choices[0].message.tool_calls
    assert len(calls) == 1
    assert calls[0].function.name == "get_weather"
    arguments = json.loads(calls[0].function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("C", "F")


def test_a_forced_call_is_the_one_that_the_model_would_make(client: Any) -> None:
    """The tags are the model's own tokens: spelled otherwise, it does not know them and calls whatever."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {word: {"type": kind}}, "required": [word]}}}
        for name, word, kind in (("get_weather", "city", "string"), ("set_timer", "minutes", "integer"))
    ]  # fmt: skip
    found = []
    for choice in ("auto", "required"):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=tools, tool_choice=choice, temperature=0, max_tokens=100, reasoning_effort="none",
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        call = answer.choices[0].message.tool_calls[0].function
        assert (call.name, call.arguments) == ("get_weather", '{"city":"Paris"}')
        found.append(answer.choices[0].token_ids)
    assert found[0] == found[1]


def test_a_tool_history_goes_back_in(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "What is the weather in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER],
        max_tokens=20,
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_tool_choice_none_hides_the_tools(server: Server) -> None:
    bare = {"messages": QUESTION, "max_tokens": 1}
    counts = [
        server.post("/v1/chat/completions", bare | more).json["usage"]["prompt_tokens"]
        for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]})
    ]
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}},
        {"structured_outputs": {"choice": ['"yes"', '"no"']}},
        {"structured_outputs": {"json": {"enum": ["yes", "no"]}}},
        {"structured_outputs": {"grammar": 'start: "\\"yes\\"" | "\\"no\\""'}},
        {"regex": '"(yes|no)"'},
    ],
    ids=str,
)
def test_structured_output(server: Server, extra: dict[str, object]) -> None:
    body = {"messages": QUESTION, "max_tokens": 20, "temperature": 1.5, "seed": 1, "reasoning_effort": "none"}
    choice = server.post("/v1/chat/completions", body | extra).json["choices"][0]
    assert choice["message"]["content"] in ('"yes"', '"no"')


def test_a_json_object(server: Server) -> None:
    body = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, "reasoning_effort": "none"}
    choice = server.post("/v1/chat/completions", body | {"response_format": {"type": "json_object"}}).json["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_thinking_budget(server: Server) -> None:
    body = {"messages": QUESTION, "max_tokens": 50, "temperature": 0, "thinking_token_budget": 2}
    message = server.post("/v1/chat/completions", body).json["choices"][0]["message"]
    assert len(message["reasoning"]) < 20
    hidden = server.post("/v1/chat/completions", body | {"include_reasoning": False}).json["choices"][0]["message"]
    assert "reasoning" not in hidden
    assert hidden["content"] == message["content"]
