"""Requests with n > 1 in the client, against a fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tests.runtime.client.fake_engine import STOP, accepted, chunk, fake_engine, text_of
from vibe_sgl_lite import Client, SamplingParams
from vibe_sgl_lite.runtime.errors import NumericalError
from vibe_sgl_lite.runtime.messages import ErrorInfo, Finish, Generate, ServerMessage


def samples(request: Generate) -> list[ServerMessage]:
    """Three samples whose chunks come mixed: the prompt, twice, and its reverse."""
    texts = [request.prompt, request.prompt, text_of(request)]
    chunks: list[ServerMessage] = [accepted(request)]
    for i in range(len(texts[0] or "")):
        for index, text in enumerate(texts):
            assert text is not None
            chunks.append(replace(chunk(request.rid, i, text[i], STOP if i == len(text) - 1 else None), index=index))
    return chunks


def test_n_samples_are_a_list_a_prompt(tmp_path: Path) -> None:
    params = SamplingParams(n=3, seed=5)
    with fake_engine(tmp_path, samples) as engine, Client(engine.address) as client:
        outputs: Any = client.generate("abc", params)
        assert [(out.index, out.text, out.finish_reason) for out in outputs] == [
            (0, "abc", "stop"),
            (1, "abc", "stop"),
            (2, "cba", "stop"),
        ]
        assert len({out.rid for out in outputs}) == 1
        seeds = [out.sampling.seed for out in outputs]
        assert [seed - seeds[0] for seed in seeds] == [0, 1, 2]
        several: Any = client.generate(["ab", "xy"], params)
        assert [[out.text for out in outputs] for outputs in several] == [["ab", "ab", "ba"], ["xy", "xy", "yx"]]
        texts = ["", "", ""]
        for piece in client.stream("abc", params):
            texts[piece.index] += piece.text
        assert texts == ["abc", "abc", "cba"]


def test_one_sample_of_several_may_fail(tmp_path: Path) -> None:
    failure = Finish(reason="error", error=ErrorInfo(code="numerical_error", message="NaN"))

    def script(request: Generate) -> list[ServerMessage]:
        bad = replace(chunk(request.rid, 0, "x", failure), index=1)
        return [accepted(request), bad, chunk(request.rid, 0, "ab", STOP)]

    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        outputs: Any = client.generate("abc", SamplingParams(n=2))
        good, bad = outputs
        assert (good.text, good.error, bad.text, bad.finish_reason) == ("ab", None, "x", "error")
        assert isinstance(bad.error, NumericalError)
        pieces = list(client.stream("abc", SamplingParams(n=2)))
        assert [(piece.index, piece.finish_reason) for piece in pieces] == [(1, "error"), (0, "stop")]
        assert isinstance(pieces[0].error, NumericalError)


def test_a_sample_of_a_bad_index_is_ignored(tmp_path: Path) -> None:
    def script(request: Generate) -> list[ServerMessage]:
        return [accepted(request), replace(chunk(request.rid, 0, "x"), index=7), chunk(request.rid, 0, "ab", STOP)]

    with fake_engine(tmp_path, script) as engine, Client(engine.address) as client:
        assert client.generate("abc").text == "ab"
