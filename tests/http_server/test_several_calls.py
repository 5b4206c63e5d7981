"""Answers to more calls than were asked for, and to calls before a cut; no engine, which would have to make them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vibe_sgl_lite.http_server import anthropic_messages, openai_chat, openai_responses
from vibe_sgl_lite.http_server.engine import Call
from vibe_sgl_lite.http_server.openai_types import ChatBody
from vibe_sgl_lite.http_server.streaming import Answer, Collected
from vibe_sgl_lite.runtime.messages import Chunk, Finish, Usage, pack_ids

QUESTION: Any = [{"role": "user", "content": "x"}]
RAW = tuple(json.dumps({"name": name, "arguments": {"at": name}}) for name in ("first", "second", "third"))
CALL = cast(Call, SimpleNamespace(n=1, running=1, prompt_tokens=[7]))


def chunks(finish: Finish) -> list[Chunk]:
    """Two calls at once, one later, and the end."""
    return [
        Chunk("r", 0, 0, pack_ids([1, 2]), "", tool_calls=RAW[:2]),
        Chunk("r", 0, 2, pack_ids([3]), "", tool_calls=RAW[2:]),
        Chunk("r", 0, 3, pack_ids([4]), "", finish, Usage(7, 4, 0)),
    ]


def collected(finish: Finish) -> list[Collected]:
    sample = Collected()
    for chunk in chunks(finish):
        sample.add(chunk)
    return [sample]


def streamed(answer: Answer, finish: Finish) -> list[Any]:
    data = answer.opening() + b"".join(answer.events(0, chunk) for chunk in chunks(finish)) + answer.closing()
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def chat(several: bool | None) -> Answer:
    body = ChatBody(messages=QUESTION, parallel_tool_calls=several)
    return openai_chat._Answer("m", body, CALL, None)


def responses(several: bool | None) -> Answer:
    body = openai_responses.ResponsesBody(input="x", parallel_tool_calls=several)
    return openai_responses._Answer("m", body, CALL)


def claude(several: bool | None) -> Answer:
    one = None if several is None else not several
    choice = anthropic_messages.ToolChoice("auto", disable_parallel_tool_use=one)
    body = anthropic_messages.MessagesBody(messages=QUESTION, max_tokens=9, tool_choice=choice)
    return anthropic_messages._Answer("m", body, CALL)


SEVERAL = pytest.mark.parametrize(("several", "count"), [(None, 3), (True, 3), (False, 1)])
STOP, LENGTH = Finish("stop", matched=2), Finish("length")


@SEVERAL
def test_chats(several: bool | None, count: int) -> None:
    whole: Any = chat(several).whole(collected(STOP))
    names = [call["function"]["name"] for call in whole["choices"][0]["message"]["tool_calls"]]
    assert names == ["first", "second", "third"][:count]
    deltas = [event["choices"][0]["delta"] for event in streamed(chat(several), STOP) if event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(count))
    assert [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == count


@SEVERAL
def test_responses(several: bool | None, count: int) -> None:
    whole: Any = responses(several).whole(collected(STOP))
    assert [item["name"] for item in whole["output"]] == ["first", "second", "third"][:count]
    events = streamed(responses(several), STOP)
    done = [event["item"]["name"] for event in events if event["type"] == "response.output_item.done"]
    assert done == ["first", "second", "third"][:count]


@SEVERAL
def test_anthropics(several: bool | None, count: int) -> None:
    whole: Any = claude(several).whole(collected(STOP))
    assert [block["input"] for block in whole["content"]] == [{"at": n} for n in ("first", "second", "third")[:count]]
    events = streamed(claude(several), STOP)
    starts = [event["content_block"]["name"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["first", "second", "third"][:count]


def test_a_cut_behind_calls_is_a_cut() -> None:
    """Who runs a conversation must not take it for the model's own end."""
    whole: Any = chat(None).whole(collected(LENGTH))
    assert whole["choices"][0]["finish_reason"] == "length"
    assert [e["choices"][0]["finish_reason"] for e in streamed(chat(None), LENGTH)][-1] == "length"
    whole = claude(None).whole(collected(LENGTH))
    assert whole["stop_reason"] == "max_tokens"
    assert [e["delta"]["stop_reason"] for e in streamed(claude(None), LENGTH) if e["type"] == "message_delta"] == [
        "max_tokens"
    ]
    whole = responses(None).whole(collected(LENGTH))
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_the_end_behind_calls_is_that_of_calls() -> None:
    whole: Any = chat(None).whole(collected(STOP))
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert [e["choices"][0]["finish_reason"] for e in streamed(chat(None), STOP)][-1] == "tool_calls"
    whole = claude(None).whole(collected(STOP))
    assert whole["stop_reason"] == "tool_use"
