"""What a client refuses by itself, by name, and what it puts on the wire."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from vibe_sgl_lite.runtime.client.requests import Plan, plan_chat, plan_generate, single
from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.messages import MAX_FRAME_BYTES, Generate, decode_extension, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

HI = {"role": "user", "content": "hi"}


def generate(prompt: Any = None, sampling_params: Any = None, **arguments: Any) -> Plan:
    named = {name: arguments.pop(name, None) for name in ("input_ids", "rid")}
    return plan_generate(prompt, sampling_params, options=arguments, **named)


def chat(messages: Any, sampling_params: Any = None, **arguments: Any) -> Plan:
    return plan_chat(messages, sampling_params, rid=arguments.pop("rid", None), options=arguments)


def sent(plan: Plan) -> list[Generate]:
    return [msgspec.msgpack.decode(request.frame, type=Generate) for request in plan.requests]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "input_ids": [1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": b"bytes"}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", None]}, "prompt"),
        ({"prompt": ["a", []]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * MAX_FRAME_BYTES}, "prompt"),
        ({"input_ids": [1] * (MAX_FRAME_BYTES // 4)}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": "abc"}, "input_ids"),
        ({"input_ids": 5}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [[1], "a"]}, "input_ids"),
        ({"input_ids": [1, 2.5]}, "input_ids"),
        ({"input_ids": [1, -1]}, "input_ids"),
        ({"input_ids": [2**31]}, "input_ids"),
        ({"prompt": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"prompt": "a", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"prompt": "a", "sampling_params": {1: 2}}, "sampling_params"),
        ({"prompt": "a", "sampling_params": 5}, "sampling_params"),
        ({"prompt": "a", "sampling_params": "x"}, "sampling_params"),
        ({"prompt": ["a"], "sampling_params": [5]}, "sampling_params"),
        ({"prompt": "a", "temperature": "x"}, "temperature"),
        ({"prompt": "a", "rid": 5}, "rid"),
        ({"prompt": ["a"], "rid": 5}, "rid"),
        ({"prompt": "a", "rid": "x" * 257}, "rid"),
        ({"prompt": "a", "rid": "\ud800"}, "rid"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt"),
        ({"prompt": "a", "regex": "\ud800"}, "regex"),
        ({"prompt": "a", "choice": ["\ud800"]}, "choice"),
        ({"prompt": "a", "priority": np.float64(1)}, "priority"),
        ({"prompt": "a", "priority": True}, "priority"),
        ({"prompt": np.array([1.5])}, "prompt"),
        ({"prompt": np.array(5)}, "prompt"),
        ({"input_ids": np.zeros((2, 2, 2), np.int64)}, "input_ids"),
        ({"input_ids": [2**70]}, "input_ids"),
        ({"prompt": "a", "sampling_params": [SamplingParams()] * 2}, "sampling_params"),
        ({"prompt": ["a", "b"], "sampling_params": [SamplingParams()]}, "sampling_params"),
        ({"prompt": ["a", "b"], "rid": "r"}, "rid"),
        ({"prompt": ["a", "b"], "rid": ["r", "r"]}, "rid"),
        ({"prompt": "a", "rid": ""}, "rid"),
        ({"prompt": "a", "rid": [5]}, "rid"),
        ({"prompt": "a", "priority": 1.5}, "priority"),
        ({"prompt": "a", "priority": 2**70}, "priority"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "a", "json_schema": 5}, "json_schema"),
        ({"prompt": "a", "json_schema": {"enum": [object()]}}, "json_schema"),
        ({"prompt": "a", "regex": ["a*"]}, "regex"),
        ({"prompt": "a", "choice": "ab"}, "choice"),
        ({"prompt": "a", "choice": ["a", 5]}, "choice"),
        ({"prompt": "a", "max_thinking_tokens": 5}, "max_thinking_tokens"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
    ],
)
def test_generate_refuses_by_name(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        generate(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": HI}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [[HI], "hi"]}, "messages"),
        ({"messages": [HI, "hi"]}, "messages"),
        ({"messages": [{"role": "user", "content": object()}]}, "messages"),
        ({"messages": [HI], "enable_thinking": 1}, "enable_thinking"),
        ({"messages": [HI], "tools": {"name": "f"}}, "tools"),
        ({"messages": [HI], "tools": ["f"]}, "tools"),
        ({"messages": [HI], "max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"messages": [HI], "max_thinking_tokens": True}, "max_thinking_tokens"),
        ({"messages": [HI], "temprature": 1}, "temprature"),
    ],
)
def test_chat_refuses_by_name(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        chat(**arguments)
    assert caught.value.field == field


def test_a_stream_takes_one() -> None:
    with pytest.raises(RequestError, match="one prompt"):
        single(generate(["a"]))
    with pytest.raises(RequestError, match="one prompt"):
        single(chat([[HI]]))
    assert single(generate("a", rid="r")).rid == "r"


def test_what_is_sent() -> None:
    (one,) = sent(generate("a", SamplingParams(temperature=0), rid="r", priority=-1, cache_salt="s"))
    assert (one.rid, one.prompt, one.input_ids, one.messages) == ("r", "a", None, None)
    assert (one.priority, one.cache_salt, one.template_kwargs) == (-1, "s", None)
    assert msgspec.msgpack.decode(one.sampling) == {"temperature": 0}
    (one,) = sent(generate((1, 2)))
    assert one.input_ids is not None
    assert unpack_ids(one.input_ids) == [1, 2]
    mixed = sent(generate(["a", [3]]))
    assert [m.prompt for m in mixed] == ["a", None]
    (one,) = sent(chat([HI], enable_thinking=False))
    assert (one.prompt, one.input_ids, one.messages) == (None, None, [HI])
    assert one.template_kwargs == {"enable_thinking": False}
    assert [m.messages for m in sent(chat([[HI], [HI, HI]]))] == [[HI], [HI, HI]]


def test_what_chats_and_grammars_send() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    (one,) = sent(chat([HI], tools=[tool], max_thinking_tokens=0))
    assert (one.template_kwargs, one.max_thinking_tokens) == ({"tools": [tool]}, 0)
    (one,) = sent(chat([HI], tools=[], json_schema={"type": "object"}))
    assert (one.template_kwargs, one.json_schema) == (None, '{"type": "object"}')
    (one,) = sent(generate("a", json_schema='{"type": "null"}'))
    assert (one.json_schema, one.regex, one.choice) == ('{"type": "null"}', None, None)
    (one,) = sent(generate("a", regex="a+", choice=None))
    assert (one.json_schema, one.regex, one.choice) == (None, "a+", None)
    assert [m.choice for m in sent(generate(["a", "b"], choice=("x", "y")))] == [["x", "y"]] * 2


def test_a_request_says_how_many_samples_it_wants() -> None:
    plan = generate(["a", "b"], [SamplingParams(n=3), SamplingParams()])
    assert [request.n for request in plan.requests] == [3, 1]


def test_rids_differ() -> None:
    assert len({request.rid for request in generate(["a"] * 1000).requests}) == 1000


@pytest.mark.parametrize(
    "prompt",
    [np.array([1, 2]), np.array([1, 2], np.uint8), [np.int64(1), np.int32(2)], torch.tensor([1, 2]), range(1, 3)],
    ids=lambda value: type(value).__name__,
)
def test_ids_of_other_libraries(prompt: Any) -> None:
    for plan in (generate(prompt), generate(input_ids=prompt), generate([prompt]), generate(input_ids=[prompt])):
        (one,) = sent(plan)
        assert one.input_ids is not None
        assert unpack_ids(one.input_ids) == [1, 2]


def test_texts_and_tables_of_other_libraries() -> None:
    words = np.array(["Once", "Then"])
    assert [m.prompt for m in sent(generate(words))] == ["Once", "Then"]
    assert [m.prompt for m in sent(generate(list(words), rid=np.array(["r", "s"])))] == ["Once", "Then"]
    assert sent(generate(words[0]))[0].prompt == "Once"
    table = np.array([[1, 2], [3, 4]])
    assert [unpack_ids(m.input_ids or b"") for m in sent(generate(table))] == [[1, 2], [3, 4]]
    (one,) = sent(generate("a", priority=np.int64(3), cache_salt=np.str_("s"), choice=words, regex=None))
    assert (one.priority, one.cache_salt, one.choice) == (3, "s", ["Once", "Then"])
    (one,) = sent(generate("a", json_schema={"maximum": np.float64(1.5), "enum": np.array([1, 2])}))
    assert json.loads(one.json_schema or "") == {"maximum": 1.5, "enum": [1, 2]}


NUMBERS = [2**70, -(2**64), 2**64 - 1, 1.5, 0, -1, 10**4299]


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
def test_tools_and_histories_may_hold_any_number(number: float) -> None:
    call = {"function": {"name": "f", "arguments": {"x": [number, np.int64(5), np.str_("y")]}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": number}}}
    (request,) = chat([HI, turn], tools=[tool]).requests
    read = msgspec.msgpack.decode(request.frame, type=Generate, ext_hook=decode_extension)
    assert read.messages is not None
    assert read.messages[1]["tool_calls"][0]["function"]["arguments"]["x"] == [number, 5, "y"]
    assert read.template_kwargs is not None
    assert read.template_kwargs["tools"][0]["function"]["parameters"]["maximum"] == number


@pytest.mark.parametrize("data", [b"x", b"", b"1" * 5000, b"1.5", b"\xff"])
def test_extensions_of_strangers(data: bytes) -> None:
    frame = msgspec.msgpack.encode([msgspec.msgpack.Ext(1, data)])
    with pytest.raises((ValueError, msgspec.ValidationError)):
        msgspec.msgpack.decode(frame, ext_hook=decode_extension)
    with pytest.raises(ValueError, match="not known"):
        decode_extension(2, memoryview(b"1"))


def test_a_call_says_whether_its_tokens_are_read_as_they_come() -> None:
    for plan in (generate("a"), generate(["a", "b"]), chat([HI])):
        assert not any(message.streamed for message in sent(plan))
    text = plan_generate("a", None, input_ids=None, rid=None, options={}, streamed=True)
    answer = plan_chat([HI], None, rid=None, options={}, streamed=True)
    assert all(message.streamed for message in (*sent(text), *sent(answer)))
