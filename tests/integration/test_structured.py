"""Chats with thinking and tools, and structured output, through the whole engine: streamed as in one go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.integration.daemon import Daemon, running
from vibe_sgl_lite import Client, OutputChunk, SamplingParams

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY = SamplingParams(max_new_tokens=200, temperature=0)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TEXT = {"type": "string", "maxLength": 8}
AGE = {"type": "integer", "minimum": 0, "maximum": 120}
PAIR = {"a": TEXT, "b": {"type": "array", "items": TEXT, "maxItems": 2}}
PLACE = {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99}, "minItems": 2, "maxItems": 2}


def record(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS: list[dict[str, Any]] = [
    record({"name": TEXT, "age": AGE, "ok": {"type": "boolean"}}),
    {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "minItems": 1, "maxItems": 4},
    record({"kind": {"const": "point"}, "at": PLACE, "note": {"anyOf": [TEXT, {"type": "null"}]}}, "note"),
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {
        "$ref": "#/$defs/pair",
        "$defs": {"pair": record(PAIR)},
    },
]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running("--dtype", "float32") as daemon, daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def noise() -> Iterator[Daemon]:
    """Random weights: whatever keeps its output in shape, it is not the model."""
    with running("--load-format", "dummy", "--dtype", "float32") as daemon:
        yield daemon


def joined(chunks: list[OutputChunk]) -> tuple[str, str, list[Any]]:
    reasoning = "".join(chunk.reasoning for chunk in chunks)
    return reasoning, "".join(chunk.text for chunk in chunks), [call for chunk in chunks for call in chunk.tool_calls]


def test_thinking_is_apart_from_the_text(client: Client) -> None:
    out = client.chat(QUESTION, GREEDY)
    assert "42" in out.text
    assert out.reasoning
    for tag in ("<think>", "</think>"):
        assert tag not in out.text + out.reasoning
    assert joined(list(client.stream_chat(QUESTION, GREEDY))) == (out.reasoning, out.text, [])
    off = client.chat(QUESTION, GREEDY, enable_thinking=False)
    assert off.reasoning == ""
    raw = client.generate("<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n", GREEDY)
    assert raw.token_ids == out.token_ids
    assert raw.text == f"<think>\n{out.reasoning}\n</think>\n\n{out.text}"
    assert raw.reasoning == ""


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thinking_budget(client: Client, budget: int) -> None:
    free = client.chat(QUESTION, GREEDY)
    out = client.chat(QUESTION, GREEDY, max_thinking_tokens=budget)
    assert free.reasoning.startswith(out.reasoning)
    assert len(out.reasoning) < len(free.reasoning)
    assert out.token_ids[: 1 + budget] == free.token_ids[: 1 + budget]
    assert out.finish_reason == "stop"
    assert out.text
    assert client.chat(QUESTION, GREEDY, max_thinking_tokens=1000).token_ids == free.token_ids


@pytest.mark.parametrize("thinking", [True, False])
def test_tool_calls(client: Client, thinking: bool) -> None:
    out = client.chat(WEATHER, GREEDY, tools=[TOOL], enable_thinking=thinking)
    (call,) = out.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert json.loads(call.raw) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert "tool_call" not in out.text
    chunks = list(client.stream_chat(WEATHER, GREEDY, tools=[TOOL], enable_thinking=thinking))
    assert joined(chunks) == (out.reasoning, out.text, out.tool_calls)
    history: list[dict[str, Any]] = [
        *WEATHER,
        {"role": "assistant", "content": out.text, "tool_calls": [{"name": call.name, "arguments": call.arguments}]},
        {"role": "tool", "content": '{"temperature": 21}'},
    ]
    assert client.chat(history, GREEDY, tools=[TOOL], enable_thinking=thinking).finish_reason == "stop"
    without = client.chat(WEATHER, GREEDY, enable_thinking=thinking)
    assert without.tool_calls == []


def test_regex_and_choice(client: Client) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.5, top_k=-1, top_p=1.0)
    for out in client.generate(["The cat said"] * 10, params, regex="[a-z]{3,8}(!|\\?)"):
        assert re.fullmatch("[a-z]{3,8}(!|\\?)", out.text)
        assert out.finish_reason == "stop"
    hot = SamplingParams(max_new_tokens=40, temperature=20, top_k=-1, top_p=1.0)
    texts = {out.text for out in client.generate(["Yes or no?"] * 20, hot, choice=["yes", "no", "né"])}
    assert texts <= {"yes", "no", "né"}
    assert len(texts) > 1
    streamed = "".join(chunk.text for chunk in client.stream("It is", params, choice=["so so", "so and so"]))
    assert streamed in ("so so", "so and so")


def test_a_schema_holds_after_the_thinking_block(client: Client) -> None:
    out = client.chat(QUESTION, GREEDY, json_schema=SCHEMAS[0])
    assert out.reasoning == client.chat(QUESTION, GREEDY).reasoning
    jsonschema.validate(json.loads(out.text), SCHEMAS[0])
    short = client.chat(QUESTION, GREEDY, json_schema=SCHEMAS[0], max_thinking_tokens=3)
    assert out.reasoning.startswith(short.reasoning)
    jsonschema.validate(json.loads(short.text), SCHEMAS[0])
    off = client.chat(QUESTION, GREEDY, json_schema=json.dumps(SCHEMAS[0]), enable_thinking=False)
    assert off.reasoning == ""
    jsonschema.validate(json.loads(off.text), SCHEMAS[0])


def check_draws(daemon: Daemon, draws: int) -> None:
    params = [
        SamplingParams(max_new_tokens=400, temperature=1.5, top_k=-1, top_p=1.0, seed=seed) for seed in range(draws)
    ]
    with daemon.client() as client:
        for schema in SCHEMAS:
            free = client.generate(["x"] * 2, SamplingParams(max_new_tokens=8, temperature=1.5))  # others in the batch
            assert {out.finish_reason for out in free} <= {"length", "stop"}
            for out in client.generate(["Answer:"] * draws, params, json_schema=schema):
                assert out.finish_reason == "stop", out
                jsonschema.validate(json.loads(out.text), schema)


def test_noise_in_the_shape_of_a_schema(noise: Daemon) -> None:
    check_draws(noise, 8)


@pytest.mark.slow
def test_five_hundred_draws(noise: Daemon) -> None:
    check_draws(noise, 100)


@pytest.mark.slow
def test_a_retracted_request_keeps_its_grammar() -> None:
    """State is replayed: the same seeds give the same documents as without retraction."""
    schema = {"type": "array", "items": {"enum": ["a", "bc", "d"]}, "minItems": 60, "maxItems": 60}
    params = [SamplingParams(max_new_tokens=220, temperature=1.5, seed=seed) for seed in range(16)]
    texts, retractions = [], []
    for size in ("8000", "600"):
        flags = ["--dtype", "float32", "--page-size", "4", "--max-total-tokens", size]
        with running(*flags) as daemon, daemon.client() as client:
            texts.append([out.text for out in client.generate(["List:"] * 16, params, json_schema=schema)])
            retractions.append(int(client.stats()["num_retractions"]))
    assert retractions[0] == 0 < retractions[1]
    assert texts[0] == texts[1]
    for text in texts[0]:
        jsonschema.validate(json.loads(text), schema)
