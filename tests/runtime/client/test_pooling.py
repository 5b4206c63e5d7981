"""What `embed` and `score` send, and what callers get of it."""

from __future__ import annotations

import asyncio
import json
from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.runtime.client.fake_engine import accepted, failing, fake_engine
from vibe_sgl_lite import AsyncClient, Client, Embedding
from vibe_sgl_lite.runtime.errors import EngineError, NumericalError, RequestError
from vibe_sgl_lite.runtime.messages import Chunk, Finish, Generate, ServerMessage, Usage, unpack_ids


def script(request: Generate) -> list[ServerMessage]:
    """As many numbers as the prompt has characters, from 0 on."""
    vector = array("f", range(len(request.prompt or "abc"))).tobytes()
    return [accepted(request), Chunk(request.rid, 0, 0, b"", "", Finish("stop"), Usage(5, 0, 3), pooled=vector)]


def ending(reason: Any) -> Any:
    return lambda request: [accepted(request), Chunk(request.rid, 0, 0, b"", "", Finish(reason), Usage(5, 0))]


def test_what_is_sent(tmp_path: Path) -> None:
    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        client.embed(["a", "b"], instruction="Find {x}", dimensions=3, priority=2, cache_salt="s", timeout_s=9)
        client.score("q", ["a", "{b}"])
        sent = engine.wait_for(Generate, 4)
    assert [(m.prompt, m.dimensions, m.pair) for m in sent[:2]] == [
        (f"Instruct: Find {{x}}\nQuery:{text}", 3, None) for text in "ab"
    ]
    assert [(m.priority, m.cache_salt, msgspec.msgpack.decode(m.sampling)) for m in sent[:2]] == [
        (2, "s", {"timeout_s": 9.0})
    ] * 2
    default = "Given a web search query, retrieve relevant passages that answer the query"
    assert [(m.prompt, m.dimensions, list(m.pair or ())) for m in sent[2:]] == [
        (None, None, [default, "q", document]) for document in ("a", "{b}")
    ]


def test_ids_are_sent_as_they_are(tmp_path: Path) -> None:
    def answer(request: Generate) -> list[ServerMessage]:
        return script(msgspec.structs.replace(request, prompt="xx"))

    with fake_engine(tmp_path, answer) as engine, Client(engine.address) as client:
        assert isinstance(client.embed([4, 5]), Embedding)
        assert isinstance(client.embed(np.array([[4, 5], [6, 7]])), list)  # type: ignore[call-overload]
        sent = engine.wait_for(Generate, 3)
    assert [unpack_ids(m.input_ids or b"") for m in sent] == [[4, 5], [4, 5], [6, 7]]
    assert {m.dimensions for m in sent} == {0}


def test_what_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        one = client.embed("abc", rid="mine")
        assert np.asarray(one.vector).dtype == np.float32
        assert torch.frombuffer(one.vector, dtype=torch.float32).tolist() == [0.0, 1.0, 2.0]
        assert json.loads(one.to_json()) == {
            "rid": "mine", "vector": [0.0, 1.0, 2.0], "finish_reason": "stop", "error": None, "weight_version": None,
            "usage": {"prompt_tokens": 5, "completion_tokens": 0, "cached_tokens": 3},
        }  # fmt: skip
        assert repr(one) == "Embedding(dimensions=3, finish_reason='stop')"
        told: list[tuple[int, int]] = []
        many = client.embed(["x" * n for n in range(1, 30)], progress=lambda *numbers: told.append(numbers))
        assert [len(each.vector) for each in many] == list(range(1, 30))
        assert told == [(n, 29) for n in range(1, 30)]
        assert client.score("q", ["a", "b"], progress=True) == [0.0, 0.0]
        assert client.score("q", "a") == 0.0
        assert capsys.readouterr().err == "1 of 2\n2 of 2\n"


def test_the_async_client_has_them(tmp_path: Path) -> None:
    async def ask(address: str) -> tuple[list[Embedding], float]:
        async with AsyncClient(address) as client:
            return await client.embed(["ab", "c"]), await client.score("q", "a")

    with fake_engine(tmp_path, script) as engine:
        embeddings, score = asyncio.run(ask(engine.address))
    assert [len(one.vector) for one in embeddings] == [2, 1]
    assert score == 0.0


def test_what_fails(tmp_path: Path) -> None:
    with fake_engine(tmp_path, failing("numerical_error", "")) as engine, Client(engine.address) as client:
        with pytest.raises(NumericalError):
            client.embed("a")
        [failed] = client.embed(["a"])
        assert isinstance(failed.error, NumericalError)
        assert (failed.finish_reason, len(failed.vector)) == ("error", 0)
        assert "numerical_error" in repr(failed)
        with pytest.raises(NumericalError):
            client.score("q", ["a"])
        engine.script = ending("abort")
        assert client.embed("a").finish_reason == "abort"
        with pytest.raises(EngineError, match="aborted"):
            client.score("q", ["a"])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.embed(None), "inputs"),
        (lambda c: c.embed({"a": 1}), "inputs"),
        (lambda c: c.embed(["a", None]), "inputs"),
        (lambda c: c.embed([[]]), "inputs"),
        (lambda c: c.embed("a", dimensions=True), "dimensions"),
        (lambda c: c.embed("a", dimensions=2.5), "dimensions"),
        (lambda c: c.embed("a", dimensions=2**30), "dimensions"),
        (lambda c: c.embed("a", instruction=["x"]), "instruction"),
        (lambda c: c.embed(["a", [1]], instruction="x"), "instruction"),
        (lambda c: c.embed("a", n=2), "n"),
        (lambda c: c.embed("a", tools=[]), "tools"),
        (lambda c: c.embed("a", rid=["x", "y"]), "rid"),
        (lambda c: c.embed("a", progress=5), "progress"),
        (lambda c: c.score(None, "a"), "query"),
        (lambda c: c.score("q", [1, 2]), "documents"),
        (lambda c: c.score("q", "a", instruction=5), "instruction"),
        (lambda c: c.score("q", "a", temperature=1), "temperature"),
    ],
)
def test_what_is_refused(tmp_path: Path, call: Any, field: str) -> None:
    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        with pytest.raises(RequestError) as error:
            call(client)
        assert error.value.field == field
        assert engine.count(Generate) == 0
