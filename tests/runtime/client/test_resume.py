"""Open requests go on after the session is lost, from what the client has: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.runtime.client.fake_engine import STOP, FakeEngine, accepted, chunk
from vibe_sgl_lite import AsyncClient, Client, SamplingParams
from vibe_sgl_lite.runtime.client import connection
from vibe_sgl_lite.runtime.errors import EngineDeadError, EngineLostError
from vibe_sgl_lite.runtime.messages import (
    Accepted,
    Chunk,
    ErrorInfo,
    Finish,
    Generate,
    LogprobEntry,
    Refused,
    ServerMessage,
    unpack_ids,
)

LOST = Finish(
    "error", error=ErrorInfo(EngineLostError.code, "the scheduler was killed by SIGKILL; the engine restarts")
)


class Model:
    """Answers each sample with the prompt reversed, a token a character; dies after `tokens` new ones of a sample."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.requests: list[Generate] = []

    def __call__(self, request: Generate) -> list[ServerMessage]:
        self.requests.append(request)
        text = (request.prompt or "")[::-1]
        replies: list[ServerMessage] = [accepted(request)]
        for index, had in enumerate(request.resume_ids or [b""] * samples(request)):
            if had is None:
                continue
            ids = unpack_ids(had)
            assert ids == [ord(c) for c in text[: len(ids)]]
            stop = len(text) if self.tokens is None else min(len(text), len(ids) + self.tokens + index)
            for first in range(len(ids), stop):
                finish = STOP if first == len(text) - 1 else None
                replies.append(replace(chunk(request.rid, first, text[first], finish), index=index))
        return replies


def samples(request: Generate) -> int:
    params = msgspec.msgpack.decode(request.sampling, type=SamplingParams)
    return params.n if isinstance(params.n, int) else 1


def seed(request: Generate) -> Any:
    return msgspec.msgpack.decode(request.sampling).get("seed")


@contextmanager
def engine_of(folder: Path, model: Any) -> Iterator[FakeEngine]:
    fake = FakeEngine(f"ipc://{folder}/api.sock", model)
    fake.lives()
    try:
        yield fake
    finally:
        fake.close()


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_started(model: Model, count: int) -> None:
    wait_until(lambda: len(model.requests) >= count)
    time.sleep(0.1)  # its chunks are on their way


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = Model(2), Model(None)
    with engine_of(tmp_path, first) as fake:
        client = Client(fake.address)
        stream = client.stream("abcdef", SamplingParams(temperature=0.5), rid="r")
        assert [next(stream).text, next(stream).text] == ["f", "e"]
    time.sleep(0.3)  # nobody is there
    with engine_of(tmp_path, second):
        assert [piece.text for piece in stream] == ["d", "c", "b", "a"]
        client.close()
    [asked], [again] = first.requests, second.requests
    assert again.resume_ids == [b"f\0\0\0e\0\0\0"]
    assert stream.sampling is not None
    assert seed(asked) is None
    assert seed(again) == stream.sampling.seed
    sampling = msgspec.msgpack.decode(again.sampling)
    assert sampling.pop("seed") == stream.sampling.seed
    assert sampling == {"temperature": 0.5}
    assert msgspec.structs.replace(again, sampling=asked.sampling, resume_ids=None) == asked


def test_many_of_any_kind(tmp_path: Path) -> None:
    """Lists, samples, what had nothing yet and what was never sent."""
    models = [Model(2), Model(2), Model(None)]
    with ThreadPoolExecutor(3) as pool:
        with engine_of(tmp_path, models[0]) as fake:
            fake.capacity = 8
            client = Client(fake.address)
            calls: list[Any] = [
                pool.submit(client.generate, ["ab" * k for k in range(1, 12)]),
                pool.submit(client.generate, "abcd", SamplingParams(n=3)),
                pool.submit(asyncio.run, _async_generate(fake.address, "xyz" * 5)),
            ]
            wait_until_started(models[0], 5)
        with engine_of(tmp_path, models[1]):
            wait_until_started(models[1], 5)
        with engine_of(tmp_path, models[2]):
            outputs = [call.result(20) for call in calls]
        client.close()
    assert [out.text for out in outputs[0]] == ["ba" * k for k in range(1, 12)]
    assert [out.text for out in outputs[1]] == ["dcba"] * 3
    assert outputs[2].text == "zyx" * 5
    for out in (*outputs[0], *outputs[1], outputs[2]):
        assert out.token_ids == [ord(c) for c in out.text]
        assert out.finish_reason == "stop"
        assert out.usage.completion_tokens == len(out.text)


def test_samples_that_have_ended_are_marked(tmp_path: Path) -> None:
    second = Model(None)
    with engine_of(tmp_path, Model(2)) as fake:
        client = Client(fake.address)
        stream = client.stream("abcd", SamplingParams(n=3))
        pieces = [next(stream) for _ in range(2 + 3 + 4)]
        assert [piece.index for piece in pieces if piece.finish_reason] == [2]
    with engine_of(tmp_path, second):
        assert [(piece.index, piece.text) for piece in stream] == [(0, "b"), (0, "a"), (1, "a")]
        client.close()
    assert [ids and len(ids) for ids in second.requests[0].resume_ids or ()] == [8, 12, None]


async def _async_generate(address: str, prompt: str) -> Any:
    async with AsyncClient(address) as client:
        return await client.generate(prompt)


def test_samples_that_the_engine_lost_are_sent_again_in_the_same_session(tmp_path: Path) -> None:
    model = Model(1)
    with engine_of(tmp_path, model) as fake, Client(fake.address) as client:
        stream = client.stream("abc", SamplingParams(n=2), rid="r")
        assert [next(stream).text for _ in range(3)] == ["c", "c", "b"]
        model.tokens = None
        fake.send(Chunk("r", 0, 1, b"", "", LOST), Chunk("r", 1, 2, b"", "", LOST))
        assert [(piece.index, piece.text) for piece in stream] == [(0, "b"), (0, "a"), (1, "a")]
    assert [request.resume_ids for request in model.requests] == [None, [b"c\0\0\0", b"c\0\0\0b\0\0\0"]]


def test_a_session_that_was_forgotten_begins_anew(tmp_path: Path) -> None:
    """As when this process was stopped for some seconds."""
    model = Model(1)
    with engine_of(tmp_path, model) as fake, Client(fake.address) as client:
        stream = client.stream("abc")
        assert next(stream).text == "c"
        model.tokens = None
        fake.send(Refused(ErrorInfo("protocol", "there is no such session")))
        assert "".join(piece.text for piece in stream) == "ba"


def test_who_opts_out_hears_of_it_at_once(tmp_path: Path) -> None:
    with engine_of(tmp_path, Model(1)) as fake:
        client = Client(fake.address, resume=False)
        first, second = client.stream("abc", rid="r"), client.stream("abc")
        assert next(first).text == next(second).text == "c"
        fake.send(Chunk("r", 0, 1, b"", "", LOST))
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            next(first)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match="lost") as caught:
        next(second)
    assert time.monotonic() - start < 10
    assert caught.value.output.text == "c"
    client.close()


def test_an_engine_that_is_gone_for_good_ends_everything_at_once(tmp_path: Path) -> None:
    with engine_of(tmp_path, Model(1)) as fake:
        client = Client(fake.address)
        stream = client.stream("abc")
        assert next(stream).text == "c"
    (tmp_path / "lock").unlink()
    start = time.monotonic()
    with pytest.raises(EngineDeadError):
        next(stream)
    assert time.monotonic() - start < 10
    client.close()


def test_an_engine_that_says_that_it_ends_is_believed(tmp_path: Path) -> None:
    with engine_of(tmp_path, Model(1)) as fake, Client(fake.address) as client:
        stream = client.stream("abc")
        assert next(stream).text == "c"
        fake.send(Refused(ErrorInfo(EngineDeadError.code, "the engine was shut down")))
        with pytest.raises(EngineDeadError, match="shut down"):
            next(stream)


def test_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECONNECT_S", 0.5)
    with engine_of(tmp_path, Model(1)) as fake:
        client = Client(fake.address)
        stream = client.stream("abc")
        assert next(stream).text == "c"
    with pytest.raises(EngineDeadError, match="lost"):
        next(stream)
    client.close()


@pytest.mark.parametrize("gains", [False, True])
def test_what_is_lost_again_and_again_without_a_token_gained_ends(tmp_path: Path, gains: bool) -> None:
    """A request that kills the engine must not do so for ever; one that advances may."""
    model = Model(1 if gains else 0)
    with engine_of(tmp_path, model) as fake, Client(fake.address) as client:
        stream = client.stream("abcdefgh", rid="r")
        for death in range(7):
            wait_until_started(model, death + 1)
            fake.send(Chunk("r", 0, 0, b"", "", LOST))
            if not gains and death == 3:
                with pytest.raises(EngineDeadError, match="SIGKILL"):
                    next(stream)
                break
        else:
            assert "".join(piece.text for piece in stream) == "hgfedcba"
    assert len(model.requests) == (8 if gains else 4)


def test_prompt_logprobs_come_once_and_the_seed_is_the_first_one(tmp_path: Path) -> None:
    entries = (None, LogprobEntry(1, -1.0, "b"))
    model = Model(1)

    def script(request: Generate) -> list[ServerMessage]:
        replies = model(request)
        wants = msgspec.msgpack.decode(request.sampling).get("prompt_logprobs")
        if wants and isinstance(replies[1], Chunk):
            replies[1] = replace(replies[1], prompt_logprobs=entries)
        return replies

    with engine_of(tmp_path, script) as fake, Client(fake.address) as client:
        stream = client.stream("abc", SamplingParams(prompt_logprobs=True))
        pieces = [next(stream)]
        before = stream.sampling
        model.tokens = None
        fake.send(Refused(ErrorInfo("protocol", "there is no such session")))
        pieces += stream
    assert [piece.prompt_logprobs for piece in pieces] == [list(entries), None, None]
    assert "prompt_logprobs" not in msgspec.msgpack.decode(model.requests[1].sampling)
    assert stream.sampling == before
    assert before is not None
    assert before.prompt_logprobs


def test_calls_that_come_during_the_gap_wait_for_its_end(tmp_path: Path) -> None:
    with engine_of(tmp_path, Model(1)) as fake:
        client = Client(fake.address)
        stream = client.stream("abc")
        next(stream)
    wait_until(lambda: client._connection._lost)
    with ThreadPoolExecutor(2) as pool:
        calls: list[Any] = [pool.submit(client.generate, "xy"), pool.submit(lambda: client.model.name)]
        time.sleep(0.3)
        assert not any(call.done() for call in calls)
        with engine_of(tmp_path, Model(None)):
            assert calls[0].result(30).text == "yx"
            assert calls[1].result(30) == "fake"
            assert "".join(piece.text for piece in stream) == "ba"
            client.close()


def test_a_lost_sample_that_its_caller_left_is_not_sent_again(tmp_path: Path) -> None:
    model = Model(1)
    with engine_of(tmp_path, model) as fake:
        client = Client(fake.address)
        stream = client.stream("abc")
        next(stream)
        stream.close()
        other = client.stream("xyz")
        next(other)
    with engine_of(tmp_path, model):
        model.tokens = None
        assert "".join(piece.text for piece in other) == "yx"
        client.close()
    assert [request.prompt for request in model.requests] == ["abc", "xyz", "xyz"]
    assert isinstance(accepted(model.requests[0]), Accepted)
