"""Outputs as people read and write them."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

import vibe_sgl_lite
from tests.runtime.client.fake_engine import answer, failing, fake_engine
from vibe_sgl_lite import AsyncClient, Client, SamplingParams
from vibe_sgl_lite.runtime.client.outputs import Embedding, Output, OutputChunk
from vibe_sgl_lite.runtime.errors import ConfigError, RequestError
from vibe_sgl_lite.runtime.messages import Generate, LogprobEntry, ServerMessage
from vibe_sgl_lite.runtime.text.chat_format import ToolCall


def test_an_output_is_readable_and_goes_to_json(tmp_path: Path) -> None:
    with fake_engine(tmp_path) as engine, Client(engine.address) as client:
        out = client.generate("ab'c", seed=7, logit_bias={5: 1})
        assert repr(out) == """Output(text="c'ba", finish_reason='stop', matched=0, tokens=4)"""
        read = json.loads(out.to_json())
        assert read == json.loads(json.dumps(out.to_dict()))
        assert read["text"] == "c'ba"
        assert read["token_ids"] == out.token_ids
        assert read["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2}
        assert (read["sampling"]["seed"], read["sampling"]["logit_bias"]) == (7, {"5": 1.0})
        assert read["error"] is None
        engine.script = failing("numerical_error")
        [failed] = client.generate(["ab"])
        assert failed.to_dict()["error"] == {
            "code": "numerical_error",
            "message": "because of numerical_error",
            "field": None,
        }
        assert "because of numerical_error" in repr(failed)


@pytest.mark.parametrize(
    ("name", "told"), [("outputs", "; there is .text"), ("output_ids", "; there is .token_ids"), ("frobs", "")]
)
def test_attributes_of_other_engines_outputs_lead_to_ours(name: str, told: str) -> None:
    out = Output(rid="r", text="x", token_ids=[1], finish_reason="stop")
    with pytest.raises(AttributeError, match=f"^Output has no {name}{re.escape(told)}$"):
        getattr(out, name)
    assert not hasattr(out, name)
    assert copy.deepcopy(out) == out
    vector = Embedding(rid="r", vector=array("f"), finish_reason="stop")
    with pytest.raises(AttributeError, match=f"^Embedding has no {name}$"):
        getattr(vector, name)


def test_an_output_that_is_all_thinking_says_what_to_do() -> None:
    only = Output(rid="r", text="", reasoning="Hm", token_ids=[1, 2], finish_reason="length")
    assert only.hint is not None
    assert only.hint in repr(only)
    for other in (
        msgspec.structs.replace(only, text="4"),
        msgspec.structs.replace(only, reasoning=""),
        msgspec.structs.replace(only, finish_reason="stop"),
        msgspec.structs.replace(only, tool_calls=[ToolCall("f", {}, "{}")]),
    ):
        assert other.hint is None
        assert "hint" not in repr(other)


def test_chunks_too() -> None:
    entry = LogprobEntry(5, -1.0, "x", (LogprobEntry(5, -1.0, "x"),), 0)
    piece = OutputChunk(rid="r", index=0, text="x", token_ids=[5], logprobs=[entry])
    assert repr(piece) == "OutputChunk(text='x', tokens=1)"
    last = OutputChunk(
        rid="r",
        index=2,
        text="",
        token_ids=[],
        finish_reason="stop",
        matched=0,
        tool_calls=[ToolCall("f", {"a": 1}, "")],
    )
    assert repr(last) == (
        "OutputChunk(index=2, text='', tool_calls=[('f', {'a': 1})], finish_reason='stop', matched=0, tokens=0)"
    )
    [read] = json.loads(piece.to_json())["logprobs"]
    assert read == {
        "token_id": 5,
        "logprob": -1.0,
        "text": "x",
        "top": [{"token_id": 5, "logprob": -1.0, "text": "x", "top": [], "text_offset": None}],
        "text_offset": 0,
    }


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert vibe_sgl_lite.__version__ == project["version"]


@pytest.mark.parametrize("arguments", [(5,), (b"ipc:///x",), (["ipc:///x"],)])
def test_an_address_that_is_no_text(arguments: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=r"address=.* must be a text"):
            kind(*arguments)
        with pytest.raises(ConfigError, match=r"name=.* must be a text"):
            kind(name=arguments[0])


def test_sampling_parameters_in_every_form(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def script(request: Generate) -> list[ServerMessage]:
        seen.append(msgspec.msgpack.decode(request.sampling))
        return answer(request)

    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        client.generate("ab", {"temperature": 0, "max_tokens": 5})
        client.generate("ab", SamplingParams(temperature=1, top_k=3), temperature=0)
        client.generate(["ab", "cd"], [{"n": 1}, SamplingParams(seed=1)], top_p=0.5)
        client.chat([{"role": "user", "content": "hi"}], temperature=0, max_tokens=7)
        assert "".join(piece.text for piece in client.stream("ab", stop="x")) == "ba"
        with pytest.raises(RequestError, match="num_predict is not a sampling parameter; max_new_tokens is"):
            client.generate("ab", num_predict=5)
        with pytest.raises(RequestError, match="temprature is no argument of this call; did you mean temperature"):
            client.generate("ab", temprature=5)
        with pytest.raises(RequestError, match="enable_thinking is no argument of this call"):
            client.generate("ab", enable_thinking=True)
    assert seen == [
        {"temperature": 0.0, "max_new_tokens": 5},
        {"temperature": 0.0, "top_k": 3},
        {"n": 1, "top_p": 0.5},
        {"seed": 1, "top_p": 0.5},
        {"temperature": 0.0, "max_new_tokens": 7},
        {"stop": ["x"]},
    ]
